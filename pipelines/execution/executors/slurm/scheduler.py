"""Calls Slurm's own commands: reads the queue and the records of ended jobs, and acts on jobs.

A controller that does not answer (restarting, or busy) is asked again for a while: nothing is decided without an
answer.
"""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from submitit.core.utils import FailedJobError

from contracts.errors import UserError
from contracts.fingerprint import digest

PATIENCE = 600.0
"""Seconds to keep asking a controller that does not answer."""
PAUSE = 5.0
ACCOUNTING_LAG_SECONDS = 10.0
"""Maximum time that accounting takes to record the end of a job."""
NO_ANSWER = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "connection timed out",
    "connection reset",
    "connection failure",
    "message receive failure",
    "message send failure",
    "zero bytes were transmitted",
    "slurmdbd",
    "problem talking to the database",
    "resource temporarily unavailable",
    "munge",
    "authentication",
)
"""Messages of commands when the controller, accounting or munge does not answer, or a clock was changed."""
LIVE = {"PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "RESIZING"}
"""States of jobs that have not ended."""


class SchedulerError(UserError):
    """A Slurm command failed with an error message, most often about a limit or a name that the cluster refuses."""


class Queued(msgspec.Struct, frozen=True):
    """A job, or a task of an array, that has not ended."""

    id: str
    """In Slurm's notation: 12, 12_3, or 12_[4-7] for tasks that have not started."""
    base: str
    """Id of the job or of the whole array."""
    state: str
    reason: str
    name: str
    nodes: str


class JobRecord(msgspec.Struct, frozen=True):
    """One start of a job or of an array's task, as recorded by accounting; after a requeue there are several."""

    id: str
    state: str
    """COMPLETED, FAILED, CANCELLED by 1000, NODE_FAIL, PREEMPTED, REQUEUED, TIMEOUT, OUT_OF_MEMORY, ..."""
    code: str
    """Exit code and signal, such as 1:0."""
    nodes: str
    start: str
    end: str
    name: str

    @property
    def base(self) -> str:
        """Id of the job or of the whole array."""
        return self.id.partition("_")[0]

    @property
    def word(self) -> str:
        """The state alone: CANCELLED for "CANCELLED by 1000"."""
        return self.state.split()[0]


def comment_of(run: Path) -> str:
    """The comment of a run's jobs, which identifies them on the cluster."""
    return f"ratchet-{digest(str(run.resolve()))[:16]}"


def queue(run: Path, patience: float = PATIENCE) -> list[Queued]:
    """The jobs of a run that have not ended."""
    wanted = comment_of(run)
    lines = call("squeue", "--me", "--noheader", "--format=%k|%i|%F|%T|%r|%N|%j", patience=patience).splitlines()
    rows = [line.split("|", 6) for line in lines]
    return [
        Queued(id, base, state, reason, name, nodes)
        for comment, id, base, state, reason, nodes, name in rows
        if wanted in comment  # clusters may append to comments
    ]


def nodes_outside(wanted: str) -> list[str]:
    """The cluster's nodes except `wanted`. Pools exclude nodes, because a job gets all that its `--nodelist` names.

    Raises:
        UserError: the cluster has no such node.
    """
    pool = call("scontrol", "show", "hostnames", wanted).split()
    present = sorted(set(call("sinfo", "--all", "--noheader", "--Node", "--format=%N").split()))
    if unknown := [node for node in pool if node not in present]:
        raise UserError(
            f"placement.pools has the nodes {wanted}, but the cluster has no {unknown[0]}. It has {', '.join(present)}."
        )
    return [node for node in present if node not in pool]


def live_ids(run: Path) -> set[str]:
    """The ids of the run's unfinished jobs; for tasks of an array, that of the array."""
    return {job.base for job in queue(run)}


def history(ids: list[str], patience: float) -> list[JobRecord]:
    """The accounting records of jobs, one per start, ordered by time. They lag behind by about a second."""
    if not ids:
        return []
    fields = "JobID,State,ExitCode,NodeList,Start,End,JobName"
    text = call("sacct", "--duplicates", "--allocations", "--parsable2", "--noheader", f"--format={fields}", "--jobs",
                ",".join(ids), "--starttime=now-365days", patience=patience)  # fmt: skip
    found = [JobRecord(*line.split("|", 6)) for line in text.splitlines()]
    return sorted(found, key=lambda record: (record.start in ("None", "Unknown"), record.start))


def complete_history(
    tasks: dict[str, int], seconds: float = ACCOUNTING_LAG_SECONDS, patience: float = PATIENCE
) -> list[JobRecord]:
    """`history` of jobs that have ended, once accounting has recorded their ends or after `seconds`.

    Args:
        tasks: number of tasks by job id; 1 if it is no array. The calling job itself has not ended; its earlier starts
            count.
        patience: how many seconds to keep asking an accounting that does not answer.
    """
    own = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    deadline = time.monotonic() + seconds
    while True:
        found = [record for record in history(list(tasks), patience) if record.base in tasks]
        ended = [record for record in found if record.word not in LIVE]
        last = {record.id: record.word for record in found}  # the latest start of each task
        known = Counter(id.partition("_")[0] for id, word in last.items() if word not in LIVE)
        if all(id == own or known[id] >= count for id, count in tasks.items()) or time.monotonic() > deadline:
            return ended
        time.sleep(0.3)


def details(job: str) -> dict[str, str]:
    """The controller's details of an unfinished job, by the names of `scontrol show job`."""
    text = call("scontrol", "--oneliner", "show", "job", job)
    return dict(item.partition("=")[::2] for item in text.split() if "=" in item)


def cancel(ids: list[str]) -> None:
    """End jobs, running or not. Jobs that have ended are ignored."""
    if ids:
        call("scancel", "--quiet", *ids)


def requeue(job: str) -> None:
    """Put a running job, or a task of an array, back into the queue under the same id."""
    call("scontrol", "requeue", job)


def set_dependency(job: str, dependency: str) -> None:
    """Replace the dependencies of a job that has not started."""
    call("scontrol", "update", f"JobId={job}", f"Dependency={dependency}")


def seconds_left(known: dict[str, str]) -> float | None:
    """Seconds until the time limit of a job with these `details`; None if unknown."""
    try:
        return (datetime.fromisoformat(known["EndTime"]) - datetime.now()).total_seconds()
    except (KeyError, ValueError):  # "Unknown"
        return None


def call(*command: str, patience: float = PATIENCE) -> str:
    """Standard output of a Slurm command.

    Raises:
        UserError: the command does not exist.
        SchedulerError: it failed, or the scheduler did not answer for `patience` seconds.
    """

    def ask() -> str:
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=120, env=_environment()
            )
        except FileNotFoundError as error:
            raise UserError(
                f"{command[0]} is not on PATH: this machine does not belong to a Slurm cluster. Start from a login "
                "node, or set executor.kind=local."
            ) from error
        return result.stdout

    return retry_until_answered(f"`{' '.join(command)}`", ask, patience)


def retry_until_answered(what: str, act: Callable[[], str], patience: float = PATIENCE) -> str:
    """Run a Slurm command, and repeat it as long as the scheduler does not answer.

    Raises:
        SchedulerError: it failed, or the scheduler did not answer for `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return act()
        except subprocess.TimeoutExpired as error:
            message = f"no answer within {error.timeout:.0f} s"
        except subprocess.CalledProcessError as error:
            message = (error.stderr.strip() or error.stdout.strip()).replace("\n", "; ")
        except FailedJobError as error:
            message = str(error).strip().replace("\n", "; ")
        unanswered = "no answer" in message or any(text in message.lower() for text in NO_ANSWER)
        if not unanswered or time.monotonic() > deadline:
            raise SchedulerError(f"{what} failed: {message}")
        time.sleep(min(PAUSE, max(0.1, patience / 10)))


def _environment() -> dict[str, Any]:
    """This process's environment without variables that change the output of Slurm's commands."""
    formats = ("SQUEUE_", "SACCT_", "SCONTROL_", "SCANCEL_", "SLURM_TIME_FORMAT")
    return {name: value for name, value in os.environ.items() if not name.startswith(formats)}
