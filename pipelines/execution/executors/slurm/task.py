"""What a job is to do, and how it tells Slurm how that went."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from contracts.errors import RunStoppedError, UserError

Duty = Literal["work", "publish", "finalize"]
FAILED = 70
"""Exit code of a job whose stage has failed for good (EX_SOFTWARE)."""
TRY_AGAIN = 75
"""Exit code of a job whose stage is tried again by another one (EX_TEMPFAIL)."""
FINALIZED = (0, UserError.exit_code, RunStoppedError.exit_code, FAILED, TRY_AGAIN)
"""Exit codes of a job that has finalized its stage. Any other is a transient failure of the job's own."""
ENDED = "RATCHET_ENDED"
"""Environment variable: the exit codes of those processes of this job that ended before they had finalized."""


@dataclass(frozen=True)
class SlurmTask:
    """What a job does."""

    module: ClassVar[str] = "pipelines.execution.executors.slurm.node"

    run: str
    stage: str
    attempt: str
    duties: tuple[Duty, ...]
    array: int = 0
    """Tasks of the array that it is one of; 0: none."""
    nodes: int = 1
    detached: bool = False
    """Whether it decides and finishes the stage by itself, without a driver."""
    grace: float = 0.0
    """Seconds that the stage may take to stop; Slurm's preemption signal comes that long, and some more, before the
    time limit."""


def start_again(retries: int, pause: float) -> list[str]:
    """Lines of bash after the process of a job that finalizes a stage of a detached run.

    Nobody else looks after that stage, and where its job fails, Slurm cancels all that wait for it. So where the
    process ends without having finalized (killed, not launched, no answer of the scheduler's), the job starts it again.

    Args:
        retries: how often.
        pause: seconds before each.
    """
    return [
        "code=$?",
        f"case $code in {' | '.join(map(str, FINALIZED))}) exit $code ;; esac",
        f'export {ENDED}="${{{ENDED}:-}} $code"',
        f"codes=(${ENDED})",
        f"if [ ${{#codes[@]}} -gt {retries} ]; then exit $code; fi",
        f"sleep {math.ceil(pause)}",
        'exec bash "$0"',
    ]
