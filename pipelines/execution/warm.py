"""Stages without the seconds that importing their libraries takes: see contracts/warm.py.

The driver starts one process for each locked environment of which several stages are still to run. A stage's supervisor
asks it for a fork. Where none can be had (the process has died, or the source has changed) the stage is started as
always: a warm process saves time, and nothing depends on it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import msgspec

from contracts.fingerprint import digest
from contracts.processes import end_groups
from contracts.warm import REFUSED, ForkRequest

READY_SECONDS = 120.0
"""How long a stage with a model waits for the imports: they take as long as its own would."""
ANSWER_SECONDS = 20.0
"""How long for a fork of a process that is ready."""
END_SECONDS = 5.0
KILLED = -signal.SIGKILL


class WarmProcesses:
    """The processes of one driver, which end with it."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._folder: Path | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def address(
        self, package: str, python: str, environment: Mapping[str, str], directory: str, *, start: bool
    ) -> Path | None:
        """The socket of a process that has imported what a package needs; None where there is none.

        Args:
            start: start one where there is none yet.
        """
        name = digest([package, python, sorted(environment.items())])[:12]
        if name not in self._processes and not start:
            return None
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="ratchet-warm-"))
        path = self._folder / name
        if name not in self._processes:
            self._logs.mkdir(parents=True, exist_ok=True)
            with (self._logs / f"{package}.log").open("ab") as log:
                self._processes[name] = subprocess.Popen(
                    [python, "-P", "-m", "contracts.warm", package, str(path)],
                    env=dict(environment),
                    cwd=directory,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        return path

    def close(self) -> None:
        """End them all."""
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        end_groups(list(self._processes.values()), END_SECONDS)
        self._processes.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class ForkedStage:
    """A stage that was forked, with what a supervisor asks of a `subprocess.Popen`."""

    def __init__(self, connection: socket.socket, pid: int, more: bytes) -> None:
        self._connection = connection
        self._received = more
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, as Popen's; None while it runs."""
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                self._received += _some(self._connection) or b"\n"
            line, end, _ = self._received.partition(b"\n")
            if end:  # it ends with the process that it was forked from, which then says nothing
                self.returncode = int(line) if line else KILLED
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def fork(
    path: Path,
    argv: list[str],
    environment: Mapping[str, str],
    directory: str,
    source: str,
    log: IO[bytes],
    patience: float,
) -> ForkedStage | None:
    """Have a stage forked from the process behind a socket; None where it cannot be.

    Args:
        argv: with the interpreter, as for a process that is started.
        source: version of the package's source.
        log: where its output goes.
        patience: seconds to wait until that process has imported everything.
    """
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline or not path.parent.exists():
            return None
        time.sleep(0.05)
    request = ForkRequest(argv[1:], dict(environment), directory, source)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(ANSWER_SECONDS)
    try:
        connection.connect(str(path))
        socket.send_fds(connection, [msgspec.json.encode(request) + b"\n"], [log.fileno()])
        answer = connection.recv(64)
    except OSError:  # it has died, or hangs
        answer = b""
    if not answer or answer == REFUSED:
        connection.close()  # which ends what it may have forked all the same
        return None
    connection.setblocking(False)
    pid, _, more = answer.partition(b"\n")
    return ForkedStage(connection, int(pid), more)


def _some(connection: socket.socket) -> bytes:
    try:
        return connection.recv(64)
    except ConnectionError:
        return b""
