"""Starts warm processes, which have imported a package's libraries, and requests forks from them: the client of
contracts/warm.py."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeAlias

import msgspec

from contracts.processes import pin_to_cores, start_leader
from contracts.versions import source_version
from contracts.warm import READY, REFUSED, WAITS, ForkRequest

WARM_SOCKET = "RATCHET_WARM"
"""Environment variable: the socket of the process that a stage was forked from, so that the stage can fork replicas."""
WARM_LABEL = "RATCHET_WARM_LABEL"
"""Environment variable: the stage's label."""
ANSWER_SECONDS = 20.0
"""How long to wait for the answer of a process that is ready."""
IMPORT_SECONDS = 120.0
"""How long to wait for the imports of a warm process, which take as long as a process of one's own would need."""
KILLED = -signal.SIGKILL
MAX_BYTES = 60
"""Maximum length of a directory's path in bytes for a socket in it."""


class ForkedProcess:
    """A forked process, with the part of the interface of `subprocess.Popen` that is needed."""

    def __init__(self, connection: socket.socket, pid: int, received: bytes) -> None:
        self._connection = connection
        self._received = received
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


def socket_folder() -> Path:
    """Create a folder for sockets, whose paths have at most 107 bytes: in /tmp if the default is too long."""
    place = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="ratchet-warm-", dir=place if len(os.fsencode(place)) < MAX_BYTES else "/tmp"))


def start_warm(
    path: Path,
    package: str,
    python: str,
    environment: Mapping[str, str],
    *,
    log: Path | None = None,
    directory: str | None = None,
    libraries: Iterable[str] = (),
) -> "subprocess.Popen[bytes]":
    """Start a warm process, which ends when its stdin is closed.

    Args:
        path: the socket at which it answers. It belongs to that process alone: once it has died, connections fail at
            once instead of waiting.
        package: the package whose stages it runs.
        python: the interpreter.
        log: receives its own output; None: this process's output does.
        libraries: what its stages need.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [python, "-P", "-m", "contracts.warm", package, str(listener.fileno()), *libraries]
        return start_leader(command, environment, log, directory, [listener.fileno()])


def start_or_fork(
    path: Path | None, command: Sequence[str], environment: Mapping[str, str], *, patience: float = 0.0, label: str = ""
) -> Process:
    """Fork a command of a package, or start it: in this process's directory, with its output, on its cores.

    The new process leads its own process group.

    Args:
        path: the socket of a warm process, from which it is forked if possible.
        command: python -m PACKAGE ...
        patience, label: as for `fork`.
    """
    argv = [sys.executable, *command[1:]]
    if path is not None:
        source = source_version(command[command.index("-m") + 1].partition(".")[0])
        with os.fdopen(os.dup(1), "wb") as output, os.fdopen(os.dup(2), "wb") as errors:
            forked = fork(path, argv, environment, os.getcwd(), source, output, patience, label, errors=errors)
        if forked is not None:
            if hasattr(os, "sched_getaffinity"):
                pin_to_cores(forked.pid, os.sched_getaffinity(0))
            return forked
    return subprocess.Popen(argv, env=dict(environment), start_new_session=True)


def fork(
    path: Path,
    argv: list[str],
    environment: Mapping[str, str],
    directory: str,
    source: str,
    log: IO[bytes],
    patience: float,
    label: str = "",
    errors: IO[bytes] | None = None,
) -> ForkedProcess | None:
    """Request a fork from the warm process that listens on a socket; None if that is not possible.

    Args:
        path: the socket.
        argv: the command, beginning with the interpreter, as for a process that is started.
        source: version of the package's source.
        log: receives the output, including stderr unless `errors` is given.
        patience: seconds to wait for the imports of the warm process; 0: do not wait for them.
        label: the stage's label, if it can use an engine or model that a stage of the same label has left.
        errors: receives stderr.
    """
    ready = path.with_name(f"{path.name}{READY}").exists()
    if not ready and not patience:
        return None
    request = ForkRequest(argv[1:], dict(environment), directory, source, label)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(ANSWER_SECONDS + (0.0 if ready else patience))
    try:
        connection.connect(str(path))
        socket.send_fds(connection, [msgspec.json.encode(request) + b"\n"], [log.fileno(), (errors or log).fileno()])
        answer = connection.recv(64)
    except OSError:  # it has died, perhaps during the imports, or hangs
        answer = b""
    if not answer or answer == REFUSED:
        connection.close()  # this also ends a fork that it may have made nevertheless
        return None
    connection.setblocking(False)
    pid, _, received = answer.partition(b"\n")
    return ForkedProcess(connection, int(pid), received)


def _some(connection: socket.socket) -> bytes:
    try:
        return connection.recv(64)
    except ConnectionError:
        return b""
