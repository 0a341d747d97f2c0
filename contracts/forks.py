"""Asking a process that has imported a package's libraries for a fork (contracts/warm.py): the side of who asks."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TypeAlias

import msgspec

from contracts.warm import READY, REFUSED, WAITS, ForkRequest

DOOR = "RATCHET_WARM"
"""Environment variable: the socket of the process that a stage was forked from, for what it starts itself."""
LABEL = "RATCHET_WARM_LABEL"
"""Environment variable: the stage's label."""
ANSWER_SECONDS = 20.0
"""How long for an answer of a process that is ready."""
KILLED = -signal.SIGKILL


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


def stays(process: Process) -> bool:
    """Whether a process has ended its stage well, and waits for another one."""
    return isinstance(process, ForkedProcess) and process.poll() == 0 and process.waits


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


def _some(connection: socket.socket) -> bytes:
    try:
        return connection.recv(64)
    except ConnectionError:
        return b""
