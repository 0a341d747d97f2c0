"""Kills an operation at each of its steps."""

import gzip
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[Any, str]
"""An object and the name of one of its functions."""
STEPS: Sequence[Call] = (
    *((os, name) for name in ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir")),
    (gzip.GzipFile, "write"),
)
"""The calls that change files."""


def is_killed_at(number: int, action: Callable[[], object], calls: Sequence[Call] = STEPS) -> bool:
    """Run `action` in a process that is killed by SIGKILL before its call number `number` of any of `calls`.

    Returns whether it was killed, that is, whether there were so many calls.
    """
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), f"the process ended with {status}"
        return status != 0
    try:
        left = [number]

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for owner, name in calls:
            setattr(owner, name, counted(getattr(owner, name)))
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
