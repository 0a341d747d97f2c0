"""Commands in a fork of the tests' own process, which has imported all that they need: starting them costs nothing.

They are `python -m PACKAGE ...` in every other respect; that these start is for the tests that start them.
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

from contracts.surroundings import finish


def run_forked(
    package: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 800,
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m PACKAGE ARGUMENTS` to its end.

    Raises:
        subprocess.TimeoutExpired: it takes too long.
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
    """`python -m PACKAGE ARGUMENTS` while it runs, with what is asked of a `subprocess.Popen`; by default it is not
    heard. It can be killed at once, and not while it imports."""

    def __init__(
        self,
        package: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        outputs: tuple[int, int] | None = None,
    ) -> None:
        """Start it; `outputs`: descriptors of its standard output and error."""
        importlib.import_module(package)
        self.arguments = arguments
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            _become(package, arguments, os.environ.copy() if env is None else env, cwd, outputs or (null, null))

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it takes too long.
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
        """Send it a signal, if it has not been waited for."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _become(
    package: str, arguments: tuple[str, ...], env: Mapping[str, str], cwd: Path | None, outputs: tuple[int, int]
) -> NoReturn:
    """Be the command, in a fork."""
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
    except BaseException:  # as Python says at its end
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
