"""Runs commands in forks of the test process, which has already imported their modules, so that they start instantly.

In all other respects they are `python -m PACKAGE ...`. Other tests check that these start.
"""

import importlib
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from contracts.entrypoint import finish


def run_forked(
    package: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 800,
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m PACKAGE ARGUMENTS` to its end.

    Raises:
        subprocess.TimeoutExpired: the command takes too long.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = Forked(package, *arguments, env=env, cwd=cwd, outputs=(out.fileno(), err.fileno()))
        try:
            code = command.wait(timeout)
        except BaseException:
            command.kill()
            command.wait()
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess([package, *arguments], code, *texts)


class Forked:
    """A running `python -m PACKAGE ARGUMENTS` with the used part of `subprocess.Popen`'s interface. By default its
    output is discarded. A kill never hits its imports, since there are none."""

    def __init__(
        self,
        package: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        outputs: tuple[int, int] | None = None,
    ) -> None:
        """Start the command; `outputs` are the descriptors of its standard output and error."""
        importlib.import_module(package)
        self.arguments = arguments
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            _become(package, arguments, os.environ.copy() if env is None else env, cwd, outputs or (null, null))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the command, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: the command takes too long.
        """
        if self.returncode is None:
            handle = os.pidfd_open(self.pid)
            try:
                if not select.select([handle], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0)
            finally:
                os.close(handle)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the command, unless it has been waited for."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _become(
    package: str, arguments: tuple[str, ...], env: Mapping[str, str], cwd: Path | None, outputs: tuple[int, int]
) -> NoReturn:
    """Run the command in the forked process, and exit."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
        sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))  # noqa: SIM115
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd or os.curdir)
        sys.argv = [package, *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            runpy.run_module(package, run_name="__main__", alter_sys=True)
            finish(0)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # reported like an uncaught exception
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
