"""The first that a job's Python runs: it holds back Slurm's preemption signals until the job can answer them.

One that comes while Python still loads libraries would end the process. submitit's own answer to it, before ours is
there, would write the job's pickle anew, and a kill in that instant would lose the job.
"""

import gc
import signal

PREEMPTION_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm is asked to send before a time limit or a preemption."""

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    from contracts.surroundings import THRESHOLD_OF_IMPORTS

    gc.set_threshold(*THRESHOLD_OF_IMPORTS)  # to the end: a job's own work is light, and imports much of it late
    from submitit.core.submission import submitit_main

    try:
        submitit_main()
    finally:
        gc.freeze()
