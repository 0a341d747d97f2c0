"""Runs one stage's command in its own process group, ends all its processes, and leaves the outcome on disk.

The driver submits `supervise` to an executor and afterwards reads only files, so that the two need not share a
machine.

Files of an attempt (logs/<stage>/attempt-<n>/):
    request.json   what to run                     written by the driver
    stage.yaml     the stage's config              written by the driver
    decision.json  the decision to run it          written by the driver, or by a detached run's first task
    cancel         asks it to end                  written by the driver
    stage.log      its output
    progress.json  its progress                    written by the stage
    heartbeat      touched while it works          written by the stage
    failure-*.json why one of its processes failed written by the stage
    exit.json      exit code and time              written last
On a cluster several supervisors work on an attempt, each with its own folder (task-<i>, publisher) for the last five.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import msgspec

from contracts.attempt import ATTEMPT, FAILURES, HEARTBEAT, STALL, reason, report_failure
from contracts.entrypoint import inherited_variables
from contracts.errors import TransientError, UserError
from contracts.files import write_atomically
from contracts.following import FOLLOW, Producer, announcement
from contracts.forks import WARM_LABEL, WARM_SOCKET, Process, fork, stays
from contracts.limits import limit_message_for_signal
from contracts.processes import (
    end_groups,
    kill,
    kill_with_variable,
    pids_with_variable,
    pin_to_cores,
    start_time,
    wait_for_end,
)
from contracts.stopping import DEFAULT_GRACE, GRACE

RUN = "RATCHET_RUN"
"""Environment variable of every process of a run: the run's directory, by which orphans are found."""
POLL_SECONDS = 0.1
REMOTE_POLL_SECONDS = 0.5
"""Interval for polling files on a file server."""
REQUEST = "request.json"
DECISION = "decision.json"


class AttemptRequest(msgspec.Struct, frozen=True):
    """A driver's request to a supervisor."""

    argv: list[str]
    environment: dict[str, str]
    """Variables to set on top of the inherited ones. Never holds a secret, because it is written to disk."""
    unset: list[str]
    """Variables to remove from the inherited ones."""
    directory: str
    run: str
    """The run's directory, by which its driver finds orphans on this machine; empty on a cluster."""
    driver: tuple[int, str] | None
    """Process id and start time of the driver, with which the stage ends. None: the stage outlives the driver."""
    grace_seconds: float = DEFAULT_GRACE
    """Time for which the stage may continue after it is asked to stop."""
    stall_seconds: float | None = None
    """Time without output or heartbeat after which a stage is ended; None: no limit."""
    first_on_path: str = ""
    """A folder to put before the supervisor's own PATH."""
    source: str = ""
    """Source version of the stage at the time of the request; a job may start much later."""
    cores: tuple[int, ...] = ()
    """The cores of this machine that the stage may use; empty: all."""
    follows: dict[str, Producer] = {}
    """Producers of the inputs that are not published yet, by input path."""
    warm: str = ""
    """Socket of a warm process that has imported the stage's libraries; empty if there is none."""
    warm_source: str = ""
    """Source version that the warm process must have imported."""
    warm_seconds: float = 0.0
    """Maximum time to wait for the warm process."""
    label: str = ""
    """Label of stages that can reuse what one of them has loaded (contracts/declaration.py)."""


def supervise(
    attempt: str,
    part: str = "",
    variables: Mapping[str, str] | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Run the command of `attempt/request.json` to its end. Returns its exit code.

    Args:
        part: the folder in the attempt for this supervisor's own files; by default the attempt itself.
        variables: further environment variables of the command.
        asked_to_stop: whether to end the command so that it can continue later; then no exit.json is written.
    """
    request = request_of(Path(attempt))
    folder = Path(attempt, part)
    folder.mkdir(exist_ok=True)
    for path in [folder / "exit.json", *folder.glob(FAILURES)]:  # left by an interrupted supervisor
        path.unlink(missing_ok=True)
    environment = {key: value for key, value in inherited_variables(os.environ).items() if key not in request.unset}
    environment.update(request.environment)
    environment.update(variables or {})
    if request.first_on_path:
        environment["PATH"] = f"{request.first_on_path}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment[ATTEMPT] = str(folder)
    if request.run:
        environment[RUN] = request.run
    if request.follows:
        environment[FOLLOW] = announcement(request.follows)
    environment[GRACE] = str(request.grace_seconds)
    environment[STALL] = "" if request.stall_seconds is None else str(request.stall_seconds)
    start, begun = time.time(), time.monotonic()
    stalled = False
    watch = Watch(folder)
    with (folder / "stage.log").open("ab") as log:
        process = _start(request, environment, log)
        if request.cores:
            pin_to_cores(process.pid, request.cores)
        try:
            while process.poll() is None:
                if asked_to_stop() or not is_driver_alive(request.driver) or Path(attempt, "cancel").exists():
                    break
                stalled = request.stall_seconds is not None and watch.silent_seconds() > request.stall_seconds
                if stalled:
                    dump_tracebacks(str(folder), process.pid)
                    break
                wait_for_end([process.pid], POLL_SECONDS if request.driver else REMOTE_POLL_SECONDS)
        finally:
            if not stays(process):
                end_groups([process], 0.0 if stalled else request.grace_seconds + 10)
            kill_with_variable(f"{ATTEMPT}={folder}")
    code = process.returncode
    assert code is not None
    if (code < 0 or code > 128) and (limit := limit_message_for_signal(-code if code < 0 else code - 128)):
        report_failure("user", limit, folder)
    if not asked_to_stop():
        record = {"code": code, "started": start, "ended": start + time.monotonic() - begun}
        if stalled:
            record["stalled"] = request.stall_seconds
        folder.mkdir(parents=True, exist_ok=True)  # the logs may have been deleted meanwhile
        write_atomically(folder / "exit.json", json.dumps(record).encode())
    return code


def supervise_locally(attempt: str) -> int:
    """Call `supervise`, and record errors outside the stage's own process as the attempt's failure."""
    try:
        return supervise(attempt)
    except Exception as error:
        code, kind, text = reason(error)
        Path(attempt).mkdir(parents=True, exist_ok=True)
        report_failure(kind, text, Path(attempt))
        return code


def request_of(attempt: Path) -> AttemptRequest:
    """The request of an attempt.

    Raises:
        TransientError: it cannot be read any more; another attempt gets a request of its own.
    """
    try:
        return msgspec.json.decode((attempt / REQUEST).read_bytes(), type=AttemptRequest)
    except (OSError, ValueError) as error:
        raise TransientError(f"{attempt / REQUEST} was deleted or damaged: {error}") from error


def _start(request: AttemptRequest, environment: Mapping[str, str], log: IO[bytes]) -> Process:
    """Start the stage's command, forked from a warm process if there is one.

    Raises:
        UserError: its program or its working directory does not exist any more.
    """
    if not Path(request.directory).is_dir():
        raise UserError(
            f"the working directory {request.directory} does not exist any more. Run the command in one that stays."
        )
    if request.warm:
        place = (request.directory, request.warm_source, log)
        variables = {**environment, WARM_SOCKET: request.warm, WARM_LABEL: request.label}
        forked = fork(Path(request.warm), request.argv, variables, *place, request.warm_seconds, request.label)
        if forked is not None:
            return forked
    try:
        return subprocess.Popen(
            request.argv,
            env=environment,
            cwd=request.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{request.argv[0]} cannot be started: {error.strerror}. Does it still exist?") from error


class Watch:
    """Detects whether a stage is still active by its heartbeat and its log."""

    def __init__(self, attempt: Path) -> None:
        self._files = (attempt / HEARTBEAT, attempt / "stage.log")
        self._seen: list[float] = []
        self._since = time.monotonic()

    def silent_seconds(self) -> float:
        """Seconds since the last change, by this machine's clock alone, since a file server's may differ."""
        seen = [modified for path in self._files if (modified := _modified(path)) is not None]
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def dump_tracebacks(attempt: str, leader: int) -> None:
    """Have every process of a stalled attempt that handles SIGQUIT write its traceback to the log."""
    for pid in dict.fromkeys([leader, *pids_with_variable(f"{ATTEMPT}={attempt}")]):
        if _handles_signal(pid, signal.SIGQUIT):
            kill(pid, signal.SIGQUIT)
    time.sleep(1.0)


def _handles_signal(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def process_identity(pid: int) -> tuple[int, str]:
    """A process id with its start time; the combination is never reused."""
    return pid, start_time(pid)


def is_driver_alive(driver: tuple[int, str] | None) -> bool:
    """Whether the process that `process_identity` described still runs on this machine."""
    return driver is None or start_time(driver[0]) == driver[1]


def end_orphans(run: Path) -> list[int]:
    """Kill the processes that a killed driver of this run left on this machine. The caller holds the run's lock."""
    return kill_with_variable(f"{RUN}={run}")


if __name__ == "__main__":
    sys.exit(supervise_locally(sys.argv[1]))
