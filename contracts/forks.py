"""Requests forks from a warm process, which has imported a package's libraries: the client of contracts/warm.py."""

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

WARM_SOCKET = "RATCHET_WARM"
"""Environment variable: the socket of the process that a stage was forked from, so that the stage can fork replicas."""
WARM_LABEL = "RATCHET_WARM_LABEL"
"""Environment variable: the stage's label."""
ANSWER_SECONDS = 20.0
"""How long to wait for the answer of a process that is ready."""
KILLED = -signal.SIGKILL


class ForkedProcess:
    """A forked process, with the part of the interface of `subprocess.Popen` that is needed."""

    def __init__(self, connection: socket.socket, pid: int, more: bytes) -> None:
        self._connection = connection
        self._received = more
        self.pid = pid
        self.returncode: int | None = None
        self.waits = False
        """Whether the process waits for another stage, instead of having exited."""

    def poll(self) -> int | None:
        """The exit code, as in Popen; None while the stage runs."""
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                self._received += _some(self._connection) or b"\n"
            line, end, _ = self._received.partition(b"\n")
            if end:  # an empty line: it was killed together with the process that it was forked from
                code, _, word = line.partition(b" ")
                self.returncode = int(code) if code else KILLED
                self.waits = word + b"\n" == WAITS
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


Process: TypeAlias = subprocess.Popen[bytes] | ForkedProcess
"""A process, started or forked."""


def stays(process: Process) -> bool:
    """Whether a process has finished its stage successfully and waits for another one."""
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
    """Request a fork from the warm process that listens on a socket; None if that is not possible.

    Args:
        path: the socket.
        argv: the command, beginning with the interpreter, as for a process that is started.
        source: version of the package's source.
        log: receives the output.
        patience: seconds to wait for the imports of the warm process; 0: do not wait for them.
        label: the stage's label, if it can use an engine or model that a stage of the same label has left.
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
    except OSError:  # it has died, perhaps during the imports, or hangs
        answer = b""
    if not answer or answer == REFUSED:
        connection.close()  # this also ends a fork that it may have made nevertheless
        return None
    connection.setblocking(False)
    pid, _, more = answer.partition(b"\n")
    return ForkedProcess(connection, int(pid), more)


def _some(connection: socket.socket) -> bytes:
    try:
        return connection.recv(64)
    except ConnectionError:
        return b""
