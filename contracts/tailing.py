"""Appends to and follows line-based files that several processes share, until the parent process ends."""

import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from contracts.errors import TransientError
from contracts.locks import try_lock


@contextlib.contextmanager
def appending(path: Path, patience: float = float("inf")) -> Iterator[IO[bytes]]:
    """Open a file of lines for appending, locked against other processes and machines.

    An unfinished last line, left by a killed process, is removed first.

    Raises:
        TransientError: another process has held the lock for more than `patience` seconds.
    """
    with path.open("a+b") as file:
        deadline = time.monotonic() + patience
        while not try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise TransientError(f"another process has appended to {path} for more than {patience:g} s")
            time.sleep(0.01)
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
        yield file
        file.flush()


def complete_lines(path: Path, offset: int) -> bytes:
    """The complete lines after `offset`; nothing if the file does not exist yet."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return b""
    return content[: content.rfind(b"\n") + 1]


def stdin_closed() -> threading.Event:
    """An event that is set when stdin is closed: the process at its other end has exited, in whatever way."""
    ended = threading.Event()

    def read() -> None:
        while os.read(sys.stdin.fileno(), 1 << 12):
            pass
        ended.set()

    threading.Thread(target=read, name="end of input", daemon=True).start()
    return ended
