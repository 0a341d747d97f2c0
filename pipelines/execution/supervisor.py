"""Runs one stage's command: in a process group of its own that always ends, with its outcome left on the disk.

The driver submits `supervise` to an executor and afterwards reads only files, so that it does not matter whether the
two share a machine.

Files of an attempt (logs/<stage>/attempt-<n>/):
    request.json   what to run                     written by the driver
    stage.yaml     the stage's config              written by the driver
    decision.json  what was decided before it      written by the driver, or by a chain's first task
    cancel         asks for the end                written by the driver
    stage.log      its output
    progress.json  how far it is                   written by the stage
    heartbeat      touched while it works          written by the stage
    failure-*.json why a process of it failed      written by the stage
    exit.json      exit code and time              written last
On a cluster several supervisors work on an attempt. The last five are then in a folder of each: task-<i>, publisher.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

import msgspec

from contracts.attempt import ATTEMPT, FAILURES, HEARTBEAT, PROGRESS, STALL, FailureKind, reason, report_failure
from contracts.errors import TransientError, UserError
from contracts.files import write_atomically
from contracts.limits import limit_behind_signal
from contracts.processes import end_groups
from contracts.stopping import DEFAULT_GRACE, GRACE, SIGNALS, TERMINAL
from contracts.surroundings import without_foreign

RUN = "RATCHET_RUN"
"""Environment variable of every process of a run: the run's directory. Orphans are found by it."""
POLL_SECONDS = 0.1
FAR_POLL_SECONDS = 0.5
"""Between two looks at files that a file server has to be asked about."""
PUBLISHER = "publisher"
COUNTED = {"done": int, "total": int, "unit": str}
PART = re.compile(rf"task-\d+|{PUBLISHER}")
REQUEST = "request.json"
DECISION = "decision.json"


class Request(msgspec.Struct, frozen=True):
    """What the driver asks a supervisor to do."""

    argv: list[str]
    environment: dict[str, str]
    """Variables to set on top of the inherited ones. Never holds a secret: it is written to disk."""
    unset: list[str]
    """Variables to remove from the inherited ones."""
    directory: str
    run: str
    """The run's directory, whose driver ends what an earlier one has left on this machine; empty on a cluster."""
    driver: tuple[int, str] | None
    """Process id and start time of the driver; the stage ends when it is gone. None: outlives the driver."""
    grace_seconds: float = DEFAULT_GRACE
    """How long the stage may go on with what it has in hand when it is asked to stop."""
    stall_seconds: float | None = None
    """A stage that says nothing for so long is ended."""
    first_on_path: str = ""
    """A folder to put before the supervisor's own PATH."""
    source: str = ""
    """Version of the stage's source when it was asked for; a job may start much later."""


def supervise(
    attempt: str,
    part: str = "",
    variables: Mapping[str, str] | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Run the command of `attempt/request.json` to its end and return its exit code.

    Args:
        part: the folder of this supervisor's own files in the attempt; by default the attempt itself.
        variables: further environment variables of the command.
        asked_to_stop: whether the command is to be ended so that it can go on later. Then nothing is said of its end.
    """
    request = request_of(Path(attempt))
    folder = Path(attempt, part)
    folder.mkdir(exist_ok=True)
    for path in [folder / "exit.json", *folder.glob(FAILURES)]:  # of what was interrupted here
        path.unlink(missing_ok=True)
    environment = {key: value for key, value in without_foreign(os.environ).items() if key not in request.unset}
    environment.update(request.environment)
    environment.update(variables or {})
    if request.first_on_path:
        environment["PATH"] = f"{request.first_on_path}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment[ATTEMPT] = str(folder)
    if request.run:
        environment[RUN] = request.run
    environment[GRACE] = str(request.grace_seconds)
    environment[STALL] = "" if request.stall_seconds is None else str(request.stall_seconds)
    start, begun = time.time(), time.monotonic()
    stalled = False
    watch = Watch(folder)
    with (folder / "stage.log").open("ab") as log:
        process = _start(request, environment, log)
        try:
            while process.poll() is None:
                if asked_to_stop() or not driver_lives(request.driver) or Path(attempt, "cancel").exists():
                    break
                stalled = request.stall_seconds is not None and watch.silent_seconds() > request.stall_seconds
                if stalled:
                    show_tracebacks(str(folder))
                    break
                time.sleep(POLL_SECONDS if request.driver else FAR_POLL_SECONDS)
        finally:
            end_groups([process], 0.0 if stalled else request.grace_seconds + 10)
            end_marked(f"{ATTEMPT}={folder}")
    code = process.returncode
    if (code < 0 or code > 128) and (limit := limit_behind_signal(-code if code < 0 else code - 128)):
        report_failure("user", limit, folder)
    if not asked_to_stop():
        record = {"code": process.returncode, "started": start, "ended": start + time.monotonic() - begun}
        if stalled:
            record["stalled"] = request.stall_seconds
        folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted the logs meanwhile
        write_atomically(folder / "exit.json", json.dumps(record).encode())
    return process.returncode


def supervise_here(attempt: str) -> int:
    """`supervise`, with what goes wrong outside of the stage's own process noted as the attempt's failure."""
    try:
        return supervise(attempt)
    except Exception as error:
        code, kind, text = reason(error)
        Path(attempt).mkdir(parents=True, exist_ok=True)
        report_failure(kind, text, Path(attempt))
        return code


def request_of(attempt: Path) -> Request:
    """What was asked for in an attempt.

    Raises:
        TransientError: nobody can read it any more; another attempt gets a request of its own.
    """
    try:
        return msgspec.json.decode((attempt / REQUEST).read_bytes(), type=Request)
    except (OSError, ValueError) as error:
        raise TransientError(f"{attempt / REQUEST} was deleted or damaged: {error}") from error


def _start(request: Request, environment: Mapping[str, str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start the stage's command.

    Raises:
        UserError: its program or its working directory does not exist any more.
    """
    if not Path(request.directory).is_dir():
        raise UserError(
            f"the working directory {request.directory} does not exist any more. Run the command in one that stays."
        )
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
    """Sees whether a stage still says anything: its heartbeat, or a line in its log."""

    def __init__(self, attempt: Path) -> None:
        self._files = (attempt / HEARTBEAT, attempt / "stage.log")
        self._seen: list[float] = []
        self._since = time.monotonic()

    def silent_seconds(self) -> float:
        """Time since the last change, by this machine's clock alone: a file server may have another."""
        seen = [modified for path in self._files if (modified := _modified(path)) is not None]
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def show_tracebacks(attempt: str) -> None:
    """Have every process of a stalled attempt that can write where it stands to the log."""
    for pid in marked(f"{ATTEMPT}={attempt}"):
        if _answers(pid, signal.SIGQUIT):
            _kill(pid, signal.SIGQUIT)
    time.sleep(1.0)


def _answers(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def process_identity(pid: int) -> tuple[int, str]:
    """A process id with its start time, which together are never reused."""
    return pid, _start_time(pid)


def driver_lives(driver: tuple[int, str] | None) -> bool:
    """Whether the process that `process_identity` described still runs on this machine."""
    return driver is None or _start_time(driver[0]) == driver[1]


def _start_time(pid: int) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return "gone" if fields[0] == "Z" else fields[19]


SEVERITY: dict[FailureKind, int] = {"user": 0, "transient": 1, "error": 2, "stopped": 3}
"""Which of several failures explains the others: the lowest."""


@dataclass(frozen=True)
class Ending:
    """How an attempt that published nothing ended."""

    kind: FailureKind
    how: str
    """In words: "failed with exit code 1."."""
    reason: str | None
    """What the first failing process said, if it said anything."""


def ending_of(attempt: Path) -> Ending:
    """How an attempt that published nothing ended, and whose fault it was."""
    endings = [_ending_of_part(part) for part in parts_of(attempt)]
    bad = [ending for ending in endings if ending is not None]
    if not bad:
        return Ending("transient", "ended without a word: its supervisor was killed.", None)
    failure = failure_of(attempt)
    if failure is None:
        return min(bad, key=lambda ending: SEVERITY[ending.kind])
    how = next((ending.how for ending in bad if ending.reason == failure["text"]), bad[0].how)
    return Ending(failure["kind"], how, failure["text"])


def parts_of(attempt: Path) -> list[Path]:
    """The folders in which the supervisors of an attempt keep their files; tasks first."""
    found = [path for path in attempt.iterdir() if PART.fullmatch(path.name)] if attempt.is_dir() else []
    return sorted(found, key=lambda path: (path.name == PUBLISHER, len(path.name), path.name)) or [attempt]


def _ending_of_part(part: Path) -> Ending | None:
    """How one supervisor's command ended; None if well."""
    failure = _first_failure([part])
    if not (part / "exit.json").exists():
        kind: FailureKind = "transient"
        killed = "ended without a word: its supervisor was killed."
        how = killed if failure is None else "failed before its command had ended."
    else:
        record = _read(part / "exit.json", {"code": int})
        if record is None:
            how, kind = "ended, but its exit.json cannot be read.", "transient"
        elif record["code"] == 0:
            return None
        else:
            how, kind = _how(record["code"], record.get("stalled"))
    return Ending(kind, how, None) if failure is None else Ending(failure["kind"], how, failure["text"])


def _how(code: int, stalled: float | None) -> tuple[str, FailureKind]:
    if stalled is not None:
        return (
            f"said nothing for {stalled:g} s and was ended (executor.stall_seconds); the log shows where it stood.",
            "transient",
        )
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return (
            "was killed by SIGKILL: by the system, if its memory ran out (dmesg says so), or by somebody.",
            "transient",
        )
    stops = {sign * number + offset for number in (*SIGNALS, *TERMINAL) for sign, offset in ((-1, 0), (1, 128))}
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}.", "stopped" if code in stops else "transient"
    return f"failed with exit code {code}.", "stopped" if code in stops else "error"


def failure_of(attempt: Path) -> dict[str, Any] | None:
    """The failure that a process of the attempt left and that explains the others.

    A mistake of the user's, or an accident of the machine, is the cause where there is one: what the other processes
    say follows from it. Among several of a kind the first counts.
    """
    tasks = [part for part in parts_of(attempt) if part.name != PUBLISHER]
    found, later = _first_failure(tasks), _first_failure([attempt / PUBLISHER])
    if found is None or (found["kind"] == "stopped" and later is not None and later["kind"] != "transient"):
        return later  # transient: what the tasks have not made is missing
    return found


def _first_failure(parts: list[Path]) -> dict[str, Any] | None:
    found = [
        _read(path, {"kind": str, "text": str, "time": (int, float)}) for part in parts for path in part.glob(FAILURES)
    ]
    records = [record for record in found if record is not None and record["kind"] in SEVERITY]
    return min(records, key=lambda record: (SEVERITY[record["kind"]], record["time"]), default=None)


def _read(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any] | None:
    """A small file that a stage or its supervisor has left; None where it was torn, or is somebody else's."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if _is_record(record, fields) else None


def _is_record(value: Any, fields: Mapping[str, type | tuple[type, ...]]) -> TypeGuard[dict[str, Any]]:
    """Whether something that was read is an object with these fields, of these types."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in fields.items())


def log_of(attempt: Path) -> Path:
    """The log to read first: of the part that failed, else of the last one that has any."""
    parts = parts_of(attempt)
    failed = [part for part in parts if _ending_of_part(part) is not None and any(part.glob(FAILURES))]
    logged = [part for part in reversed(parts) if (part / "stage.log").is_file()]
    return [*failed, *logged, attempt][0] / "stage.log"


def progress_of(attempt: Path) -> str | None:
    """How far an attempt says it is: "3/8 shards" or "3/8 shards, 17/64 samples of the next"; None: nothing yet."""
    found = [_read(part / PROGRESS, COUNTED) for part in parts_of(attempt)]
    records = [record for record in found if record is not None]
    if not records:
        return None
    furthest = max(records, key=lambda record: record["done"])
    within = furthest.get("within")
    more = f", {within['done']}/{within['total']} {within['unit']} of the next" if _is_record(within, COUNTED) else ""
    return f"{furthest['done']}/{furthest['total']} {furthest['unit']}{more}"


def end_orphans(run: Path) -> list[int]:
    """Kill the processes that a killed driver of this run has left on this machine. Call it under the run's lock."""
    return end_marked(f"{RUN}={run}")


def marked(mark: str) -> list[int]:
    """The processes on this machine, but this one, that have the variable NAME=VALUE in their environment."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        if mark.encode() in variables and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def end_marked(mark: str) -> list[int]:
    """Kill the processes that have a variable in their environment, and wait until they are gone."""
    found = marked(mark)
    for pid in found:
        _kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(_start_time(pid) != "gone" for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
