"""The entry point of a job: blocks Slurm's preemption signals until the job can handle them.

A signal while Python still loads libraries would end the process. submitit's own handler, active until ours is set,
would rewrite the job's pickle, and a kill in that instant would lose the job.
"""

import gc
import signal

PREEMPTION_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that Slurm is asked to send before a time limit or a preemption."""

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    from contracts.entrypoint import IMPORT_GC_THRESHOLD

    gc.set_threshold(*IMPORT_GC_THRESHOLD)  # never reset: a job's own work is light, and much of it is imported late
    from submitit.core.submission import submitit_main

    try:
        submitit_main()
    finally:
        gc.freeze()
