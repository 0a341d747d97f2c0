"""Does the work of a job on its nodes: runs the stage's command, publishes and finalizes.

Every task of every array imports this module first, so it imports as little as possible.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import submitit

from contracts.attempt import ATTEMPT, PROGRESS, ROLE, fail
from contracts.errors import TransientError, UserError
from contracts.files import exists_uncached, write_atomically
from contracts.stopping import SIGNALS
from pipelines.execution.endings import PUBLISHER
from pipelines.execution.executors.base import JobEntry
from pipelines.execution.executors.slurm import scheduler
from pipelines.execution.executors.slurm.start import PREEMPTION_SIGNALS
from pipelines.execution.executors.slurm.task import EXIT_CODES, Duty, SlurmTask
from pipelines.execution.supervisor import DECISION, supervise

RENDEZVOUS_SECONDS = 300.0
"""Maximum time that the nodes of a job wait for its first node."""
SIGNAL_MARGIN_SECONDS = 150.0
"""Maximum time in seconds between Slurm's preemption signal and the start of the grace period: our margin, and the
granularity of Slurm's clock."""


def perform(task: SlurmTask, entry: JobEntry) -> None:
    """Run a job's duties on one of its nodes."""
    _record_restart(task)
    code = 0
    for duty in task.duties:
        code = _run_duty(duty, task, entry)
        if code and duty == "work" and "finalize" not in task.duties:
            break
    if code:
        sys.exit(code)


def _record_restart(task: SlurmTask) -> None:
    ended = os.environ.pop(EXIT_CODES, "").split()
    if not ended:
        return
    from pipelines.run.directory import RunDirectory
    from pipelines.run.events import JobRestarted

    job = submitit.JobEnvironment()
    event = JobRestarted(stage=task.stage, job=job.job_id, host=job.hostname, code=ended[-1])
    RunDirectory(Path(task.run)).record(event)


def _run_duty(duty: Duty, task: SlurmTask, entry: JobEntry) -> int:
    """Run one duty. Errors outside the stage's own process are recorded as its failure."""
    part = Path(task.attempt, PUBLISHER if duty != "work" else f"task-{_index(task)}")
    try:
        if duty != "finalize":
            return _run_command(task, part.name, entry)
        from pipelines.execution.executors.slurm.detached import finalize

        return finalize(task, entry)
    except Exception as error:
        part.mkdir(parents=True, exist_ok=True)
        os.environ[ATTEMPT] = str(part)
        code = fail(error)
        return 1 if duty == "finalize" else code  # 1: not finalized


def _run_command(task: SlurmTask, part: str, entry: JobEntry) -> int:
    """Run the stage's command, or this process's share of it. If it has to stop early, ask for a requeue."""
    stop = StopRequest()
    code = 128 + signal.SIGUSR2  # for a stage that has to stop before it starts
    try:
        if not stop() and task.detached and _is_reused(task, entry):
            return 0
        if not stop():
            code = supervise(task.attempt, part, {ROLE: "publisher"} if part == PUBLISHER else _variables(task), stop)
    except TransientError:  # also if the signal ended a program that was asked
        if not stop() and _preemption(scheduler.details(submitit.JobEnvironment().job_id)) is None:
            raise
    if not stop() and code not in {128 + number for number in SIGNALS}:
        return code
    job = submitit.JobEnvironment()
    known = scheduler.details(job.job_id)
    reason = _why_stopped(known, task.grace) if stop() else _preemption(known)
    if reason is None:
        return code  # cancelled by scancel
    if job.global_rank > 0:
        return 0  # the first node asks for the requeue; an error here would end it before
    if reason == "time limit":
        require_progress(Path(task.attempt, part), task.stage, known.get("TimeLimit", ""))
    from pipelines.run.directory import RunDirectory
    from pipelines.run.events import JobRequeued

    event = JobRequeued(stage=task.stage, job=job.job_id, reason=reason, host=job.hostname)
    RunDirectory(Path(task.run)).record(event)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it, and Slurm would have to kill this process
    try:
        scheduler.requeue(job.job_id)
    except scheduler.SchedulerError as error:  # requeueing is turned off on this cluster
        print(f"not requeued, so that another job has to be submitted: {error}", file=sys.stderr)
        return code
    while True:
        time.sleep(1)  # until Slurm ends this process


def _is_reused(task: SlurmTask, entry: JobEntry) -> bool:
    """Whether the stage is reused, which the first of its tasks decides for all."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: decide again
        return bool(json.loads(Path(task.attempt, DECISION).read_bytes())["reuse"])
    from pipelines.execution.executors.slurm.detached import prepare

    return prepare(task, entry).reuse


class StopRequest:
    """Tells whether Slurm has sent its preemption signal since the job started: before a time limit or a preemption."""

    def __init__(self) -> None:
        self._asked = False
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PREEMPTION_SIGNALS)  # start.py has blocked them

    def __call__(self) -> bool:
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def _preemption(known: dict[str, str]) -> str | None:
    """\"preempted\" if Slurm is preempting the job with these details, else None."""
    return None if known.get("PreemptTime", "None") in ("None", "Unknown", "N/A") else "preempted"


def _why_stopped(known: dict[str, str], grace: float) -> str:
    """The reason for Slurm's preemption signal to a job with these details."""
    left = scheduler.seconds_left(known)
    if preemption := _preemption(known):
        return preemption
    if left is not None and left < grace + SIGNAL_MARGIN_SECONDS:
        return "time limit"
    return "signal" if left is None else f"signal, {left:.0f} s before the time limit"


def require_progress(part: Path, stage: str, limit: str) -> None:
    """Raise UserError if a stage has reached its time limit twice without progress in between."""
    mark, progress = part / "limit.json", part / PROGRESS
    now = progress.read_bytes() if progress.exists() else b""
    if mark.exists() and mark.read_bytes() == now:
        raise UserError(
            f"stage {stage} made no progress between two time limits ({limit}). Raise "
            "executor.resources.time, or that of its entry in executor.stages; for a training also lower "
            "checkpoint_seconds."
        )
    part.mkdir(exist_ok=True)  # the stage may have been stopped before it started
    write_atomically(mark, now)


def _index(task: SlurmTask) -> int:
    """The number of this task of an array, or of this node of a job."""
    return int(os.environ.get("SLURM_ARRAY_TASK_ID" if task.array > 1 else "SLURM_PROCID", "0"))


def _variables(task: SlurmTask) -> dict[str, str]:
    """Environment variables that give this process its rank among the stage's tasks or nodes."""
    index = _index(task)
    if task.array:
        return {ROLE: "task", "RANK": str(index + 1), "WORLD_SIZE": str(task.array + 1)}
    if task.nodes == 1:
        return {}
    host, _, port = _rendezvous(task, index).rpartition(":")
    return {"NODE_RANK": str(index), "MASTER_ADDR": host, "MASTER_PORT": port}


def _rendezvous(task: SlurmTask, index: int) -> str:
    """host:port of the first node, which picks a free port and writes it to a file for the others."""
    start = re.sub(r"\W", "-", f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}")
    path = Path(task.attempt, f"rendezvous-{start}")
    if index == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        write_atomically(path, f"{submitit.JobEnvironment().hostnames[0]}:{port}".encode())
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    while not exists_uncached(path):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"the first node of the job did not start within {RENDEZVOUS_SECONDS:.0f} s ({path} is missing)"
            )
        time.sleep(0.2)
    return path.read_text()
