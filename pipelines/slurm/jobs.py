"""The jobs of one attempt at a stage: how they are submitted, and what they do on their nodes.

    W   works: one supervisor per task of an array, or per node
    F   finishes, after W has ended in whatever way: publishes what an array's tasks have made; in a chain without a
        driver it also concludes (pipelines/slurm/chain.py), and so do the stages that are too small for a job W of
        their own

submitit passes a job on as a pickle in a private folder outside of the run directory. A job that is requeued, by Slurm
or by itself, starts again from that pickle: everything else is on the disk.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal

import msgspec
import submitit

from contracts.artifacts import MANIFEST, write_atomically
from contracts.attempt import ATTEMPT, PROGRESS, report_failure
from contracts.errors import UserError, as_user_error, is_transient
from contracts.fingerprint import digest
from contracts.stage import ROLE
from contracts.stopping import SIGNALS
from pipelines.config import ExecutorSection
from pipelines.executors import job_folder
from pipelines.graph import Graph, Node
from pipelines.rundir import RunDirectory
from pipelines.slurm import scheduler
from pipelines.slurm.resources import Resources, finishing, mark_of, resources_of, submitit_parameters
from pipelines.slurm.scripts import job_name, make_executor
from pipelines.supervisor import PUBLISHER, supervise

RECORD = "jobs.json"
MEET_SECONDS = 300.0
"""How long the nodes of a job wait for the first of them."""
Duty = Literal["work", "publish", "conclude"]


class Jobs(msgspec.Struct, frozen=True):
    """What was submitted for an attempt, as jobs.json in its folder says."""

    work: str
    """W's id."""
    finish: str | None
    """F's id, where there is one."""
    chained: bool
    """Whether they conclude by themselves; otherwise a driver does."""
    submitted: float
    """When, in seconds since 1970."""
    array: int = 1
    """How many tasks W has."""

    @property
    def ids(self) -> list[str]:
        """All of them, in the order in which they run."""
        return [self.work, *([self.finish] if self.finish else [])]

    @property
    def tasks(self) -> dict[str, int]:
        """How many tasks each of them has, by id."""
        return {id: self.array if id == self.work else 1 for id in self.ids}

    @property
    def last(self) -> str:
        """The one after which the attempt is over; what later stages wait for in a chain."""
        return self.ids[-1]


def jobs_of(attempt: Path) -> Jobs | None:
    """The jobs of an attempt, if any were submitted."""
    path = attempt / RECORD
    return msgspec.json.decode(path.read_bytes(), type=Jobs) if path.exists() else None


def last_jobs(run: RunDirectory, stage: str) -> Jobs | None:
    """The jobs of the latest attempt at a stage."""
    attempts = run.attempts(stage)
    return jobs_of(attempts[-1]) if attempts else None


def unfinished_jobs(run: RunDirectory, graph: Graph) -> dict[str, Jobs]:
    """The latest jobs of those stages that have published nothing; they may have ended."""
    missing = [name for name, node in graph.nodes.items() if not (node.output / MANIFEST).is_file()]
    return {name: jobs for name in missing if (jobs := last_jobs(run, name)) is not None}


def end_unknown(run: Path) -> list[str]:
    """Cancel what was submitted for a run by a command that was killed before it had noted the ids; returns those.

    Nobody else may be submitting for it meanwhile.
    """
    attempts = [path.parent for path in (run / "logs").rglob(RECORD)]
    known = {id for attempt in attempts if (jobs := jobs_of(attempt)) for id in jobs.ids}
    live = {job.base for job in scheduler.queue(run)}
    unknown = sorted(live - known)
    scheduler.cancel(unknown)
    clear_folders(run, live & known)
    return unknown


@dataclass(frozen=True)
class Task:
    """What a job does."""

    run: str
    stage: str
    attempt: str
    duties: tuple[Duty, ...]
    array: int = 0
    """Tasks of the array that it is one of; 0: none."""
    nodes: int = 1
    chained: bool = False


def submit(
    node: Node,
    attempt: Path,
    graph: Graph,
    executor: ExecutorSection,
    *,
    chained: bool = False,
    after: tuple[str, ...] = (),
    pause: float | None = None,
) -> Jobs:
    """Submit the jobs of an attempt whose request is written, and note their ids in its folder.

    Args:
        chained: they conclude by themselves.
        after: jobs that have to succeed before.
        pause: seconds to wait before the start.
    """
    run, resources = graph.directory, resources_of(node, executor, graph)
    array = resources.tasks if resources.is_array else 0
    task = Task(str(run), node.name, str(attempt), ("work",), array, resources.nodes, chained)
    make = functools.partial(_submit, executor=executor, run=run, chained=chained)
    success = [f"afterok:{':'.join(after)}"] if after else []
    if chained and resources.kind == "light":
        task = replace(task, duties=("work", "conclude"))
        work, finish = make(task, resources, dependency=success, pause=pause), None
    else:
        work, finish = make(task, resources, dependency=success, pause=pause), None
        duties: tuple[Duty, ...] = (*(("publish",) if array else ()), *(("conclude",) if chained else ()))
        if duties:
            last = replace(task, duties=duties, array=0, nodes=1)
            finish = make(last, finishing(executor), dependency=[f"afterany:{work}", *success], pause=None)
    jobs = Jobs(work, finish, chained, time.time(), max(1, array))
    write_atomically(attempt / RECORD, msgspec.json.encode(jobs))
    return jobs


def _submit(
    task: Task,
    resources: Resources,
    *,
    executor: ExecutorSection,
    run: Path,
    chained: bool,
    dependency: list[str],
    pause: float | None,
) -> str:
    """Hand one job to Slurm; returns its id."""
    step = "work" if "work" in task.duties else "finish"
    folder = slurm_folder(run) / f"{name_of(Path(task.attempt))}-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    parameters = submitit_parameters(
        resources,
        name=job_name(run, task.stage, finishing=step == "finish"),
        grace_seconds=executor.grace_seconds,
        dependency=",".join(dependency) or None,
        kill_on_invalid_dependency=bool(dependency),
        begin=pause,
        comment=mark_of(run),
    )
    slurm = make_executor(folder, parameters)

    def hand_over() -> str:
        with _outside_of_jobs():
            if task.array > 1:
                return str(slurm.map_array(perform, [task] * task.array)[0].job_id)
            return str(slurm.submit(perform, task).job_id)

    return scheduler.patiently(f"submitting stage {task.stage}", hand_over).partition("_")[0]


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Submit as from a login node, also where a job submits another one: without what tells it of itself."""
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env((ROLE, ATTEMPT)):
        os.environ.update(kept)
        yield


def name_of(attempt: Path) -> str:
    """A short name of an attempt, however its path is written."""
    return digest(str(attempt.resolve()))[:16]


def slurm_folder(run: Path) -> Path:
    """Where submitit describes the Slurm jobs of a run; all nodes have to see it."""
    return job_folder(run) / "slurm"


def clear_folders(run: Path, live: set[str]) -> None:
    """Delete what jobs needed that have ended, whichever command submitted them."""
    for folder in slurm_folder(run).glob("*"):
        ids = {path.name.partition("_")[0] for path in folder.glob("*_submission.sh")}
        if ids and not ids & live:
            shutil.rmtree(folder, ignore_errors=True)


def keep_last_words(attempt: Path, run: Path) -> None:
    """Copy what the jobs of an attempt have printed themselves to its logs."""
    for log in job_logs(attempt, run):
        if log.parent != attempt:
            shutil.copyfile(log, attempt / log.name)


def job_logs(attempt: Path, run: Path) -> list[Path]:
    """What the jobs of an attempt have printed themselves, before and after the stage's own output."""
    folders = [slurm_folder(run) / f"{name_of(attempt)}-{step}" for step in ("work", "finish")]
    found = {path.name: path for folder in (attempt, *folders) for path in sorted(folder.glob("*_log.out"))}
    return list(found.values())


# On the nodes.


def perform(task: Task) -> None:
    """What a job runs on each of its nodes."""
    code = 0
    for duty in task.duties:
        code = _guarded(duty, task)
        if code and duty == "work" and "conclude" not in task.duties:
            break
    if code:
        sys.exit(code)


def _guarded(duty: Duty, task: Task) -> int:
    """Run one duty; what goes wrong outside of the stage's own process is noted as its failure."""
    part = Path(task.attempt, PUBLISHER if duty != "work" else f"task-{_index(task)}")
    try:
        if duty != "conclude":
            return _run_command(task, part.name)
        from pipelines.slurm.chain import conclude

        return conclude(task)
    except Exception as error:
        part.mkdir(parents=True, exist_ok=True)
        os.environ[ATTEMPT] = str(part)
        if mistake := as_user_error(error):
            report_failure("user", str(mistake))
            print(f"error: {mistake}", file=sys.stderr)
            return UserError.exit_code
        report_failure("transient" if is_transient(error) else "error", traceback.format_exc())
        traceback.print_exc()
        return 1


def _run_command(task: Task, part: str) -> int:
    """Run the stage's command, or this process's share of it; ask for a requeue where it has to stop before its end."""
    stop = StopRequest()
    if task.chained:
        from pipelines.slurm.chain import prepare

        if prepare(task).reuse:
            return 0
    code = supervise(task.attempt, part, {ROLE: "publisher"} if part == PUBLISHER else _variables(task), stop)
    if not stop() and code not in {128 + number for number in SIGNALS}:
        return code
    job = submitit.JobEnvironment()
    known = scheduler.details(job.job_id)
    reason = _why_stopped(known, stop)
    if reason is None:
        return code  # by scancel
    if job.global_rank > 0:
        return 0  # the first node asks for the requeue, and must not be ended by this one before
    if reason == "time limit":
        require_progress(Path(task.attempt, part), task.stage, known.get("TimeLimit", ""))
    RunDirectory(Path(task.run)).record("requeue", stage=task.stage, job=job.job_id, reason=reason, host=job.hostname)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it, and Slurm would have to kill this process
    try:
        scheduler.requeue(job.job_id)
    except scheduler.SchedulerError as error:  # this cluster has it turned off
        print(f"not requeued, so that another job has to be submitted: {error}", file=sys.stderr)
        return code
    while True:
        time.sleep(1)  # until Slurm ends this process


class StopRequest:
    """Whether Slurm has sent the signal that precedes the time limit or a preemption.

    submitit's own handler would write the job's pickle anew first, and a kill in that instant would lose the job.
    """

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._note)

    def __call__(self) -> bool:
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def _why_stopped(known: dict[str, str], stop: Callable[[], bool]) -> str | None:
    """Why a job with these details was asked to stop; None where it was not Slurm that asked."""
    if known.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"):
        return "preempted"
    left = scheduler.seconds_left(known)
    if left is not None and left < 300 and stop():
        return "time limit"
    return f"signal{'' if left is None else f', {left:.0f} s before the time limit'}" if stop() else None


def require_progress(part: Path, stage: str, limit: str) -> None:
    """Raise UserError where a stage has reached its time limit twice without getting further in between."""
    mark, progress = part / "limit.json", part / PROGRESS
    now = progress.read_bytes() if progress.exists() else b""
    if mark.exists() and mark.read_bytes() == now:
        raise UserError(
            f"stage {stage} got no further between two ends of its time limit ({limit}). Raise executor.slurm.time, or "
            "that of its entry in executor.stages; for a training also lower checkpoint_seconds."
        )
    write_atomically(mark, now)


def _index(task: Task) -> int:
    """The number of this task of an array, or of this node of a job."""
    return int(os.environ.get("SLURM_ARRAY_TASK_ID" if task.array > 1 else "SLURM_PROCID", "0"))


def _variables(task: Task) -> dict[str, str]:
    """What tells the stage's command which of several it is."""
    index = _index(task)
    if task.array:
        return {ROLE: "task", "RANK": str(index + 1), "WORLD_SIZE": str(task.array + 1)}
    if task.nodes == 1:
        return {}
    host, _, port = _meeting_point(task, index).rpartition(":")
    return {"NODE_RANK": str(index), "MASTER_ADDR": host, "MASTER_PORT": port}


def _meeting_point(task: Task, index: int) -> str:
    """host:port of the first node, which chooses a free port and leaves it in a file for the others."""
    start = re.sub(r"\W", "-", f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}")
    path = Path(task.attempt, f"meeting-{start}")
    if index == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        write_atomically(path, f"{submitit.JobEnvironment().hostnames[0]}:{port}".encode())
    deadline = time.monotonic() + MEET_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"the first node of the job did not start within {MEET_SECONDS:.0f} s ({path} is missing)"
            )
        os.scandir(path.parent).close()  # has a network file system look again
        time.sleep(0.2)
    return path.read_text()
