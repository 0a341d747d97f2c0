"""Says on stderr how far something is that takes longer than a moment."""

import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 1.5
"""Seconds in which nobody wonders."""
PAUSE = {True: 0.2, False: 5.0}
"""Seconds between two words, on a terminal and elsewhere."""
CLEAR = "\r\x1b[2K"


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for, if that takes longer than a moment."""
    timer = threading.Timer(PATIENCE, lambda: print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def tracked(items: Collection[T], what: str) -> Iterator[T]:
    """The items one after another, with a word from time to time: a line that renews itself, or lines in a log."""
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
