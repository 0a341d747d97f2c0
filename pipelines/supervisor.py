"""Runs one stage's command: in a process group of its own that always ends, with its outcome left on the disk.

The driver submits `supervise` to an executor and afterwards reads only files, so that it does not matter whether the
two share a machine.

Files of an attempt (logs/<stage>/attempt-<n>/):
    request.json   what to run                     written by the driver
    stage.yaml     the stage's config              written by the driver
    stage.log      its output
    progress.json  how far it is                   written by the stage
    failure-*.json why a process of it failed      written by the stage
    cancel         asks for the end                written by the driver
    exit.json      exit code and time              written last
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec

from contracts.artifacts import write_atomically
from contracts.processes import end_group
from contracts.stage import ATTEMPT

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


def supervise(attempt: str) -> int:
    """Run the command of `attempt/request.json` to its end and return its exit code."""
    folder = Path(attempt)
    request = msgspec.json.decode((folder / "request.json").read_bytes(), type=Request)
    environment = {key: value for key, value in os.environ.items() if key not in request.unset}
    environment.update(request.environment)
    environment[ATTEMPT] = attempt
    environment[RUN] = request.run
    start = time.time()
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
                time.sleep(POLL_SECONDS)
        finally:
            end_group(process)
    record = {"code": process.returncode, "started": start, "ended": time.time()}
    write_atomically(folder / "exit.json", json.dumps(record).encode())
    return process.returncode


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


def failure_of(attempt: Path) -> dict[str, Any] | None:
    """The first failure that a process of the attempt left, by time: the others usually follow from it."""
    records = [json.loads(path.read_bytes()) for path in attempt.glob("failure-*.json")]
    return min(records, key=lambda record: float(record["time"]), default=None)


def progress_of(attempt: Path) -> str | None:
    """How far an attempt says it is: "3/8 shards"; None where it has not said anything yet."""
    path = attempt / "progress.json"
    if not path.exists():
        return None
    record = json.loads(path.read_bytes())
    return f"{record['done']}/{record['total']} {record['unit']}"


def ending_of(attempt: Path) -> str:
    """How an attempt that did not publish ended, in words."""
    if not (attempt / "exit.json").exists():
        return "ended without a word: its supervisor was killed."
    code = int(json.loads((attempt / "exit.json").read_bytes())["code"])
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL: by the system, if its memory ran out (dmesg says so), or by somebody."
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}."
    return f"failed with exit code {code}."


def end_orphans(run: Path) -> list[int]:
    """Kill the processes that a killed driver of this run has left on this machine. Call it under the run's lock."""
    mark = f"{RUN}={run}".encode()
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        if mark in variables and pid != os.getpid():
            found.append(pid)
    for pid in found:
        _kill(pid)
    deadline = time.monotonic() + 10
    while any(_start_time(pid) != "gone" for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
