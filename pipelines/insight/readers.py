"""Starts child processes that read a run's files while it is in progress, and whose failure does not affect it."""

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from contracts.processes import end_groups, start_leader

LAST_LINES = 3
MAX_LOG_BYTES = 16 << 20
"""Bytes of a log beyond which it is cut to the latest half of that."""


class ReaderProcess:
    """A child process that reads a run. Its stdin ends when no more comes, also if this process dies."""

    def __init__(self, command: list[str], environment: Mapping[str, str], first_line: bytes, log: Path) -> None:
        """Start it.

        Args:
            first_line: its task, written as the first line of its stdin.
            log: file to which its output is appended.
        """
        self.log = log
        self._begin = log.stat().st_size if log.exists() else 0
        self._process = start_leader(command, environment, log)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already; its log says why
            self._process.stdin.write(first_line + b"\n")
            self._process.stdin.flush()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def failure(self) -> str | None:
        """The last lines of its log if it has failed, or has ended before its stdin was closed; else None. Every call
        also limits the size of the log."""
        self._keep_log_small()
        code = self._process.poll()
        assert self._process.stdin is not None
        if code is None or (code == 0 and self._process.stdin.closed):
            return None
        with self.log.open("rb") as file:
            file.seek(self._begin)
            lines = file.read().decode(errors="replace").strip().splitlines()
        return f"{' | '.join(lines[-LAST_LINES:]) or 'no message'} (exit code {code}; {self.log})"

    def _keep_log_small(self) -> None:
        """Cut off the beginning of a log that has become too long, while the process may be appending to it."""
        with contextlib.suppress(FileNotFoundError):  # somebody has deleted it
            if self.log.stat().st_size <= MAX_LOG_BYTES:
                return
            with self.log.open("r+b") as file:
                file.seek(-MAX_LOG_BYTES // 2, os.SEEK_END)
                latest = file.read()
                while more := file.read():  # what is written between the last read and the cut is lost
                    latest += more
                file.seek(0)  # the child appends, so it continues at the new end
                file.write(b"(what came before was cut off)\n" + latest.partition(b"\n")[2])
                file.truncate()
            self._begin = 0

    def end_input(self) -> None:
        """Close its stdin: nothing more comes."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def wait_until(self, deadline: float) -> bool:
        """Wait for its end until `deadline` (time.monotonic). Returns whether it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
            return True
        return False

    def wait(self, deadline: float) -> str | None:
        """Wait for its end until `deadline` (time.monotonic), then kill it. Returns the failure, if there is one."""
        if self.wait_until(deadline):
            return self.failure()
        end_groups([self._process], 0.0)
        return f"it was not done in time and was ended ({self.log})"
