"""Where a user's coroutines stand: a stack dump of the process that runs them shows its event loop alone."""

import asyncio
import sys
from collections import Counter
from collections.abc import Iterable
from types import FrameType
from typing import Any


def show_waiting(number: int, frame: FrameType | None) -> None:
    """Handle a signal: write the stacks of the coroutines under way to stderr, if there are any."""
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:  # no event loop runs
        return
    print(stacks(tasks), file=sys.stderr, flush=True)


def stacks(tasks: "Iterable[asyncio.Task[Any]]") -> str:
    """The stacks of coroutines, each with how many stand there, as faulthandler writes those of threads."""
    found = Counter(_stack(task.get_coro()) for task in tasks)
    return "\n".join(
        f"Coroutines that wait here: {count} (most recent call first):\n{stack}"
        for stack, count in found.most_common()
        if stack
    )


def _stack(coroutine: Any) -> str:
    """Down to what it awaits in the end, which is no coroutine: a future."""
    lines: list[str] = []
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        code = frame.f_code
        lines.insert(0, f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
        coroutine = coroutine.cr_await
    return "\n".join(lines)
