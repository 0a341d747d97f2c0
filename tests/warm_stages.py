"""Runs stages in forks of a process that has imported their package's libraries, as the driver does.

Importing takes longer than most tested work. A fork is equivalent to `python -m PACKAGE ...`, except that variables
which libraries read while they are imported must be set when the first stage of the package is started; other tests
check that the commands start on their own.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from contracts.forks import WARM_SOCKET, ForkedProcess, fork
from contracts.processes import wait_for_end
from contracts.versions import source_version
from pipelines.execution.warm import WarmProcesses

ROOT = Path(__file__).parents[1]
IMPORT_SECONDS = 200.0
_processes = WarmProcesses(Path(tempfile.mkdtemp(prefix="warm-tests-")))
"""What this test process has imported; it ends with it."""


class WarmStage:
    """A forked stage, with the part of the interface of `subprocess.Popen[str]` that tests use."""

    def __init__(self, process: ForkedProcess, output: IO[bytes], errors: IO[bytes]) -> None:
        self._process = process
        self._files = (output, errors)
        self.pid = process.pid
        self.poll = process.poll
        self.send_signal = process.send_signal

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def wait(self, timeout: float = 300.0) -> int:
        """Wait for its end and return its exit code.

        Raises:
            subprocess.TimeoutExpired: it takes too long.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked stage", timeout)
            wait_for_end([self.pid], 0.2)
        return code

    def communicate(self, timeout: float = 300.0) -> tuple[str, str]:
        """Wait for its end, and return its stdout and stderr."""
        self.wait(timeout)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return texts[0], texts[1]


@functools.cache
def warm_socket(package: str, *libraries: str) -> Path:
    """The socket of the process that a package's stages are forked from, started with the first of them."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return _processes.address(package, sys.executable, variables, str(ROOT), libraries)


def start_stage(
    package: str,
    *arguments: Any,
    environment: dict[str, str] | None = None,
    libraries: Iterable[str] = ("torch", "transformers"),
    module: str = "",
    log: IO[bytes] | None = None,
) -> WarmStage:
    """Start `python -m PACKAGE ARGUMENTS`.

    Args:
        module: what to run instead of the package.
        log: receives stdout and stderr, instead of `communicate`.
        environment: variables on top of this process's.
        libraries: what the process that it is forked from imports, besides what every stage of the package needs.
    """
    path = warm_socket(package, *libraries)
    variables = {**os.environ, WARM_SOCKET: str(path), **(environment or {})}
    output = log or tempfile.TemporaryFile()  # noqa: SIM115
    errors = log or tempfile.TemporaryFile()  # noqa: SIM115
    command = [sys.executable, "-m", module or package, *map(str, arguments)]
    place = (variables, str(ROOT), source_version(package), output, IMPORT_SECONDS)
    process = fork(path, command, *place, errors=errors)
    assert process is not None, f"no stage of {package} can be forked: {path}"
    return WarmStage(process, output, errors)


def run_stage_warm(
    package: str, *arguments: Any, timeout: float = 300.0, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m PACKAGE ARGUMENTS` to its end; the options are those of `start_stage`."""
    stage = start_stage(package, *arguments, **options)
    texts = stage.communicate(timeout)
    return subprocess.CompletedProcess([package, *map(str, arguments)], stage.returncode or 0, *texts)
