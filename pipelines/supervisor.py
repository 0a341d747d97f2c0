"""Runs one stage's command: in a process group of its own that always ends, with its outcome left on the disk.

The driver submits `supervise` to an executor and afterwards reads only files, so that it does not matter whether the
two share a machine.

Files of an attempt (logs/<stage>/attempt-<n>/):
    request.json   what to run                     written by the driver
    stage.yaml     the stage's config              written by the driver
    stage.log      its output
    progress.json  how far it is                   written by the stage
    heartbeat      touched while it works          written by the stage
    failure-*.json why a process of it failed      written by the stage
    cancel         asks for the end                written by the driver
    exit.json      exit code and time              written last
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from contracts.artifacts import write_atomically
from contracts.attempt import ATTEMPT, FAILURES, HEARTBEAT, PROGRESS, FailureKind
from contracts.processes import end_groups
from contracts.stopping import DEFAULT_GRACE, GRACE, SIGNALS

RUN = "RATCHET_RUN"
"""Environment variable of every process of a run: the run's directory. Orphans are found by it."""
POLL_SECONDS = 0.1


class Request(msgspec.Struct, frozen=True):
    """What the driver asks a supervisor to do."""

    argv: list[str]
    environment: dict[str, str]
    """Variables to set on top of the inherited ones. Never holds a secret: it is written to disk."""
    unset: list[str]
    """Variables to remove from the inherited ones."""
    directory: str
    run: str
    driver: tuple[int, str] | None
    """Process id and start time of the driver; the stage ends when it is gone. None: outlives the driver."""
    grace_seconds: float = DEFAULT_GRACE
    """How long the stage may go on with what it has in hand when it is asked to stop."""
    stall_seconds: float | None = None
    """A stage that says nothing for so long is ended."""


def supervise(attempt: str) -> int:
    """Run the command of `attempt/request.json` to its end and return its exit code."""
    folder = Path(attempt)
    request = msgspec.json.decode((folder / "request.json").read_bytes(), type=Request)
    environment = {key: value for key, value in os.environ.items() if key not in request.unset}
    environment.update(request.environment)
    environment[ATTEMPT] = attempt
    environment[RUN] = request.run
    environment[GRACE] = str(request.grace_seconds)
    start = time.time()
    stalled = False
    watch = Watch(folder)
    with (folder / "stage.log").open("ab") as log:
        process = subprocess.Popen(
            request.argv,
            env=environment,
            cwd=request.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if (folder / "cancel").exists() or not driver_lives(request.driver):
                    break
                stalled = request.stall_seconds is not None and watch.silent_seconds() > request.stall_seconds
                if stalled:
                    show_tracebacks(attempt)
                    break
                time.sleep(POLL_SECONDS)
        finally:
            end_groups([process], 0.0 if stalled else request.grace_seconds + 10)
            end_marked(f"{ATTEMPT}={attempt}")
    record = {"code": process.returncode, "started": start, "ended": time.time()}
    if stalled:
        record["stalled"] = request.stall_seconds
    write_atomically(folder / "exit.json", json.dumps(record).encode())
    return process.returncode


class Watch:
    """Sees whether a stage still says anything: its heartbeat, or a line in its log."""

    def __init__(self, attempt: Path) -> None:
        self._files = (attempt / HEARTBEAT, attempt / "stage.log")
        self._seen: list[float] = []
        self._since = time.monotonic()

    def silent_seconds(self) -> float:
        """Time since the last change, by this machine's clock alone: a file server may have another."""
        seen = [path.stat().st_mtime for path in self._files if path.exists()]
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since


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
    failure = failure_of(attempt)
    if not (attempt / "exit.json").exists():
        kind: FailureKind = "transient"
        how = "ended without a word: its supervisor was killed."
    else:
        record = json.loads((attempt / "exit.json").read_bytes())
        how, kind = _how(int(record["code"]), record.get("stalled"))
    if failure is None:
        return Ending(kind, how, None)
    return Ending(failure["kind"], how, failure["text"])


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
    stops = {sign * number + offset for number in SIGNALS for sign, offset in ((-1, 0), (1, 128))}
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}.", "stopped" if code in stops else "transient"
    return f"failed with exit code {code}.", "stopped" if code in stops else "error"


def failure_of(attempt: Path) -> dict[str, Any] | None:
    """The failure that a process of the attempt left and that explains the others.

    A mistake of the user's, or an accident of the machine, is the cause where there is one: what the other processes
    say follows from it. Among several of a kind the first counts.
    """
    records = [json.loads(path.read_bytes()) for path in attempt.glob(FAILURES)]
    order = {"user": 0, "transient": 1, "error": 2, "stopped": 3}
    return min(records, key=lambda record: (order[record["kind"]], float(record["time"])), default=None)


def progress_of(attempt: Path) -> str | None:
    """How far an attempt says it is: "3/8 shards"; None where it has not said anything yet."""
    path = attempt / PROGRESS
    if not path.exists():
        return None
    record = json.loads(path.read_bytes())
    return f"{record['done']}/{record['total']} {record['unit']}"


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
