"""Reading a file of lines while others append to it, until the process that has started this one says that it ends."""

import os
import sys
import threading
from pathlib import Path


def whole_lines(path: Path, offset: int) -> bytes:
    """The lines behind `offset` that were written to their ends; nothing where there is no file yet."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return b""
    return content[: content.rfind(b"\n") + 1]


def end_of_input() -> threading.Event:
    """An event that is set when stdin ends, by whatever end of the process that holds its other side."""
    ended = threading.Event()

    def read() -> None:
        while os.read(sys.stdin.fileno(), 1 << 12):
            pass
        ended.set()

    threading.Thread(target=read, name="end of input", daemon=True).start()
    return ended
