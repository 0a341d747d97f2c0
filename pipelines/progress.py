"""Shows on stderr the progress of operations that take longer than a moment."""

import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 1.5
"""Seconds before anything is shown."""
PAUSE = {True: 0.2, False: 5.0}
"""Seconds between two messages, on a terminal and elsewhere."""
CLEAR = "\r\x1b[2K"


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Print what the command waits for, if that takes longer than PATIENCE."""
    timer = threading.Timer(PATIENCE, lambda: print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """Iterate over items and show progress: a line that is rewritten on a terminal, occasional lines in a log."""
    terminal = sys.stderr.isatty()
    begin, end = (CLEAR, "") if terminal else ("", "\n")
    due, shown = time.monotonic() + PATIENCE, False
    try:
        for number, item in enumerate(items):
            if (now := time.monotonic()) >= due:
                print(f"{begin}{what}: {number} of {len(items)}", end=end, file=sys.stderr, flush=True)
                due, shown = now + PAUSE[terminal], True
            yield item
    finally:
        if terminal and shown:
            print(CLEAR, end="", file=sys.stderr, flush=True)
