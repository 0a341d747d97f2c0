"""Describes a job's work, and defines its exit codes for Slurm."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from contracts.errors import RunStoppedError, UserError

Duty = Literal["work", "publish", "finalize"]
FAILED = 70
"""Exit code of a job whose stage has failed for good (EX_SOFTWARE)."""
RETRIED = 75
"""Exit code of a job whose stage is retried by another job (EX_TEMPFAIL)."""
FINAL_EXIT_CODES = (0, UserError.exit_code, RunStoppedError.exit_code, FAILED, RETRIED)
"""Exit codes of a job that has finalized its stage. Any other is a transient failure of the job itself."""
EXIT_CODES = "RATCHET_ENDED"
"""Environment variable: exit codes of the processes of this job that ended before finalizing."""


@dataclass(frozen=True)
class SlurmTask:
    """A job's work: a stage, an attempt, and its duties."""

    module: ClassVar[str] = "pipelines.execution.executors.slurm.node"

    run: str
    stage: str
    attempt: str
    duties: tuple[Duty, ...]
    array: int = 0
    """Number of tasks of its array; 0 if it is no array."""
    nodes: int = 1
    detached: bool = False
    """Whether the run has no driver, so that the job decides about the stage and finalizes it."""
    grace: float = 0.0
    """Seconds that the stage may take to stop. Slurm's preemption signal comes that long and a margin before the time
    limit."""


def restart_lines(retries: int, pause: float) -> list[str]:
    """Lines of bash to run after the process of a job that finalizes a stage of a detached run.

    No other process looks after that stage, and if its job fails, Slurm cancels all jobs that depend on it. So if
    the process ends without finalizing (killed, not launched, no answer from the scheduler), it is restarted.

    Args:
        retries: maximum number of restarts.
        pause: seconds before each restart.
    """
    return [
        "code=$?",
        f"case $code in {' | '.join(map(str, FINAL_EXIT_CODES))}) exit $code ;; esac",
        f'export {EXIT_CODES}="${{{EXIT_CODES}:-}} $code"',
        f"codes=(${EXIT_CODES})",
        f"if [ ${{#codes[@]}} -gt {retries} ]; then exit $code; fi",
        f"sleep {math.ceil(pause)}",
        'exec bash "$0"',
    ]
