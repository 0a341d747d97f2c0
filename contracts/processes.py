"""Owning the processes that one starts: they end when their parent ends."""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

_PR_SET_PDEATHSIG = 1
AN_INSTANT = 0.01


def die_with_parent(parent: int | None = None, number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process the signal `number` when its parent dies (Linux; elsewhere: nothing).

    `parent`: the expected parent's pid; if it is gone already, exit at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def outlive_parent() -> None:
    """Take back what `die_with_parent` has asked for."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0)


class GroupLeader(Protocol):
    """A process that leads a group of its own: what of `subprocess.Popen` is needed to end it."""

    @property
    def pid(self) -> int:
        """Its id."""
        ...

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def send_signal(self, number: int, /) -> None:
        """Send it a signal, if it runs."""
        ...


def start_leader(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    directory: str | None = None,
    descriptors: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """Start a process whose stdin ends with this process, however that ends, and whose output is appended to `log`.

    It leads a group of its own, so a key of the terminal does not end it.

    Args:
        descriptors: files that it finds open, under the same numbers.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=dict(environment),
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=descriptors,
        )


def end_groups(processes: Sequence[GroupLeader], grace: float) -> None:
    """End processes that lead their own groups, and all of those groups.

    First the leaders alone are asked (SIGTERM), who may take `grace` seconds to finish what they have in hand with the
    help of their children; then what is left of the groups is asked; at last it is killed.
    """
    start = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGTERM)
    wait_until(lambda: all(process.poll() is not None for process in processes), grace)
    patience = max(5.0, grace - (time.monotonic() - start))  # a leader such as `conda run` ends without its child
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        if wait_until(lambda: all(_is_gone(process) for process in processes), seconds):
            return


def _is_gone(process: GroupLeader) -> bool:
    return process.poll() is not None and not group_exists(process.pid)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is so, and no longer than so many seconds; whether it is."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def group_exists(group: int) -> bool:
    """Whether any process is in a group."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def wait_for_end(pids: Iterable[int], seconds: float) -> None:
    """Wait until one of these processes has ended, but no longer than so many seconds; of one that is there no more,
    for an instant."""
    opened: list[int] = []
    try:
        for pid in pids if hasattr(os, "pidfd_open") else ():
            try:
                opened.append(os.pidfd_open(pid))
            except OSError:  # it has ended, or there are too many open files
                seconds = min(seconds, AN_INSTANT)
        select.select(opened, [], [], seconds)
    finally:
        for descriptor in opened:
            os.close(descriptor)


def start_time(pid: int) -> str:
    """When a process began, in the clock of its machine; "gone" where it has ended. With its id it is never reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return "gone" if fields[0] == "Z" else fields[19]


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
        kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(start_time(pid) != "gone" for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def kill(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
