"""Dumps the stacks of a user's coroutines; a stack dump of the process shows only its event loop."""

import asyncio
import sys
from collections import Counter
from collections.abc import Iterable
from types import FrameType
from typing import Any


def dump_coroutines(number: int, frame: FrameType | None) -> None:
    """Signal handler: write the stacks of the running coroutines to stderr, if there are any."""
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:  # no event loop runs
        return
    print(stacks(tasks), file=sys.stderr, flush=True)


def stacks(tasks: "Iterable[asyncio.Task[Any]]") -> str:
    """The distinct stacks of the tasks' coroutines, each with its number of occurrences, in faulthandler's format."""
    found = Counter(_stack(task.get_coro()) for task in tasks)
    return "\n".join(
        f"Coroutines that wait here: {count} (most recent call first):\n{stack}"
        for stack, count in found.most_common()
        if stack
    )


def _stack(coroutine: Any) -> str:
    """The stack of a coroutine and of the coroutines that it awaits, down to the future that they all wait for."""
    lines: list[str] = []
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        code = frame.f_code
        lines.insert(0, f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
        coroutine = coroutine.cr_await
    return "\n".join(lines)
