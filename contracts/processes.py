"""Starts, watches and ends child processes, such that they end when their parent ends."""

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
_PR_SET_NAME = 15
MINIMUM_WAIT = 0.01


def die_with_parent(parent: int | None = None, number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process the signal `number` when its parent dies (no effect outside of Linux).

    `parent`: the expected parent's pid; if it is gone already, exit at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def outlive_parent() -> None:
    """Undo `die_with_parent`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0)


def name_process(name: str) -> None:
    """Set the name, of at most 15 characters, that `ps -o comm` and `top` show for this process (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NAME, name.encode()[:15])


class GroupLeader(Protocol):
    """A process that leads its own process group, with the part of `subprocess.Popen` that is needed to end it."""

    @property
    def pid(self) -> int:
        """The process id."""
        ...

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        ...

    def send_signal(self, number: int, /) -> None:
        """Send it a signal, if it runs."""
        ...


def start_leader(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path | None,
    directory: str | None = None,
    descriptors: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """Start a process whose stdin is closed when this process ends in any way.

    It leads its own process group, so Ctrl-C in the terminal does not end it.

    Args:
        log: the file to which its output is appended; None: it inherits this process's output.
        descriptors: file descriptors that it inherits, with the same numbers.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if log is None else log.open("ab") as output:
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
    """End processes that lead their own groups, and all processes of these groups.

    First, SIGTERM goes to the leaders alone, which have `grace` seconds to finish their current work with the help of
    their children; then to the remaining processes of the groups; in the end these are killed.
    """
    start = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGTERM)
    wait_until(lambda: all(process.poll() is not None for process in processes), grace)
    patience = max(5.0, grace - (time.monotonic() - start))  # a leader such as `conda run` may end before its child
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        if wait_until(lambda: all(_is_gone(process) for process in processes), seconds):
            return


def _is_gone(process: GroupLeader) -> bool:
    return process.poll() is not None and not group_exists(process.pid)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, but at most `seconds`; return whether it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def group_exists(group: int) -> bool:
    """Whether a process group has any processes."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def wait_for_end(pids: Iterable[int], seconds: float) -> None:
    """Wait until one of the processes ends, but at most `seconds`; only for an instant if one has ended already."""
    opened: list[int] = []
    try:
        for pid in pids if hasattr(os, "pidfd_open") else ():
            try:
                opened.append(os.pidfd_open(pid))
            except OSError:  # it has ended, or there are too many open files
                seconds = min(seconds, MINIMUM_WAIT)
        select.select(opened, [], [], seconds)
    finally:
        for descriptor in opened:
            os.close(descriptor)


def pin_to_cores(pid: int, cores: Iterable[int]) -> None:
    """Restrict a process, and processes that it starts from now on, to these cores."""
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        os.sched_setaffinity(pid, cores)


def start_time(pid: int) -> str:
    """The start time of a process, which makes its id unique on the machine; "gone" if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return "gone" if fields[0] == "Z" else fields[19]


def pids_with_variable(variable: str) -> list[int]:
    """Ids of the other processes on this machine whose environment contains `variable` (NAME=VALUE)."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended, or belongs to another user
            continue
        if variable.encode() in variables and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def kill_with_variable(variable: str) -> list[int]:
    """Kill the other processes whose environment contains `variable` (NAME=VALUE), wait up to 10 s until they are gone,
    and return their ids."""
    found = pids_with_variable(variable)
    for pid in found:
        kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(start_time(pid) != "gone" for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def kill(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
