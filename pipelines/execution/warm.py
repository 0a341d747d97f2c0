"""Stages without the seconds that importing their libraries takes: see contracts/warm.py.

The driver starts one process for each locked environment of which several stages are still to run, one stage ahead of
the first that is to run now. A stage's supervisor asks it for a fork. Where none can be had (the process has died, or
the source has changed) the stage is started as always: a warm process saves time, and nothing depends on it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TypeAlias

import msgspec

from contracts.fingerprint import digest
from contracts.processes import end_groups, start_leader
from contracts.warm import READY, REFUSED, RELEASED, WAITS, ForkRequest

ANSWER_SECONDS = 20.0
"""How long for an answer of a process that is ready."""
END_SECONDS = 5.0
LONGEST = 60
"""Bytes of a directory's path in which a socket can be made."""
KILLED = -signal.SIGKILL


class WarmProcesses:
    """The processes of one driver, which end with it."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._folder: Path | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._devices: dict[str, set[str]] = {}

    def has(self, package: str, python: str, environment: Mapping[str, str]) -> bool:
        """Whether there is a process that has imported what a package needs."""
        return _name(package, python, environment) in self._processes

    def address(
        self,
        package: str,
        python: str,
        environment: Mapping[str, str],
        directory: str,
        libraries: Iterable[str] = (),
    ) -> Path:
        """Its socket; where there is none yet, one is started that imports what stages with these libraries need.

        It belongs to that process alone: once it has died, nobody can connect, or is left waiting.
        """
        name = _name(package, python, environment)
        self._folder = self._folder or _new_folder()
        path = self._folder / name
        if name not in self._processes:
            self._devices[name] = devices_of(environment)
            log = self._logs / f"{package}.log"
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
                door.bind(str(path))
                door.listen()
                command = [python, "-P", "-m", "contracts.warm", package, str(door.fileno()), *libraries]
                self._processes[name] = start_leader(command, environment, log, directory, [door.fileno()])
        return path

    def release(self, devices: set[str], keep: str) -> None:
        """Have what these processes keep loaded on some devices given back, but for what stages of one label use.

        Args:
            devices: names as in CUDA_VISIBLE_DEVICES; empty: all.
        """
        for name, process in self._processes.items():
            here = self._devices[name]
            if process.poll() is None and (not devices or not here or devices & here):
                assert self._folder is not None
                _release(self._folder / name, keep)

    def close(self) -> None:
        """End them all."""
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        end_groups(list(self._processes.values()), END_SECONDS)
        self._processes.clear()
        self._devices.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class ForkedProcess:
    """A process that was forked, with what is asked of a `subprocess.Popen`."""

    def __init__(self, connection: socket.socket, pid: int, more: bytes) -> None:
        self._connection = connection
        self._received = more
        self.pid = pid
        self.returncode: int | None = None
        self.waits = False
        """Whether its process has not ended with the stage, but waits for another one."""

    def poll(self) -> int | None:
        """Its exit code, as Popen's; None while it runs."""
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                self._received += _some(self._connection) or b"\n"
            line, end, _ = self._received.partition(b"\n")
            if end:  # it ends with the process that it was forked from, which then says nothing
                code, _, word = line.partition(b" ")
                self.returncode = int(code) if code else KILLED
                self.waits = word + b"\n" == WAITS
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


Process: TypeAlias = subprocess.Popen[bytes] | ForkedProcess
"""A process, however it was started."""


def fork(
    path: Path,
    argv: list[str],
    environment: Mapping[str, str],
    directory: str,
    source: str,
    log: IO[bytes],
    patience: float,
    label: str = "",
) -> ForkedProcess | None:
    """Have a process forked from the one behind a socket; None where it cannot be.

    Args:
        argv: with the interpreter, as for a process that is started.
        source: version of the package's source.
        log: where its output goes.
        patience: seconds that the imports of that process may still take; 0: they are not waited for.
        label: of the stage, where it can use what another one of that label has left.
    """
    ready = path.with_name(f"{path.name}{READY}").exists()
    if not ready and not patience:
        return None
    request = ForkRequest(argv[1:], dict(environment), directory, source, label)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(ANSWER_SECONDS + (0.0 if ready else patience))
    try:
        connection.connect(str(path))
        socket.send_fds(connection, [msgspec.json.encode(request) + b"\n"], [log.fileno()])
        answer = connection.recv(64)
    except OSError:  # it has died, also while it imported, or hangs
        answer = b""
    if not answer or answer == REFUSED:
        connection.close()  # which ends what it may have forked all the same
        return None
    connection.setblocking(False)
    pid, _, more = answer.partition(b"\n")
    return ForkedProcess(connection, int(pid), more)


def _new_folder() -> Path:
    """For sockets, whose paths have at most 107 bytes: where the one for temporary files is too long, in /tmp."""
    place = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="ratchet-warm-", dir=place if len(os.fsencode(place)) < LONGEST else "/tmp"))


def devices_of(environment: Mapping[str, str]) -> set[str]:
    """The GPUs that a process sees, where its environment says which."""
    return set(filter(None, environment.get("CUDA_VISIBLE_DEVICES", "").split(",")))


def _release(path: Path, keep: str) -> None:
    """Have the processes ended that wait behind a socket; one that does not answer keeps what it has."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(str(path))
        connection.sendall(msgspec.json.encode(ForkRequest([], {}, "", "", keep)) + b"\n")
        connection.recv(len(RELEASED))


def _name(package: str, python: str, environment: Mapping[str, str]) -> str:
    return digest([package, python, sorted(environment.items())])[:12]


def _some(connection: socket.socket) -> bytes:
    try:
        return connection.recv(64)
    except ConnectionError:
        return b""
