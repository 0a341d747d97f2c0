"""What a supervised stage tells of itself, in its attempt's directory: that it lives, how far it is, why it failed.

A stage that is run by hand has no such directory and tells nothing.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal

from contracts import stopping
from contracts.errors import TransientError, UserError, as_user_error, is_transient
from contracts.files import process_name, write_atomically

ATTEMPT = "RATCHET_ATTEMPT"
"""Environment variable: the directory of the attempt."""
ROLE = "RATCHET_ROLE"
"""Environment variable: what this process is to do of a stage that works in shards; unset: everything."""
STALL = "RATCHET_STALL_SECONDS"
"""Environment variable: after how long a silence this stage is ended; unset: never."""
HEARTBEAT = "heartbeat"
PROGRESS = "progress.json"
FAILURES = "failure-*.json"
BEAT_SECONDS = 1.0

FailureKind = Literal["user", "transient", "stopped", "error"]
"""Whose fault it is: the user's, the machine's or the network's, nobody's (it was asked to stop), or a defect."""


def supervised() -> bool:
    """Whether somebody watches this stage and will start it again after an accident."""
    return bool(os.environ.get(ATTEMPT))


_last = {HEARTBEAT: 0.0, PROGRESS: 0.0}
_progress: dict[str, Any] = {}


def beat() -> None:
    """Say that work goes on; cheap enough for every batch. A stage that is silent too long counts as stalled."""
    attempt = os.environ.get(ATTEMPT)
    if attempt and time.monotonic() - _last[HEARTBEAT] > BEAT_SECONDS:
        _last[HEARTBEAT] = time.monotonic()
        with contextlib.suppress(OSError):  # on a full disk, or where somebody has deleted the logs, work goes on
            Path(attempt, HEARTBEAT).touch()


def report_progress(done: int, total: int, unit: str) -> None:
    """Say how far the work is; cheap enough for every step."""
    _progress.clear()
    _progress.update({"done": done, "total": total, "unit": unit})
    _tell(at_once=done == total)


def report_within(done: int, total: int, unit: str) -> None:
    """Say how far the unit in hand is of which `report_progress` has spoken, where that much of it outlives a kill."""
    if _progress:  # else another process of this stage tells
        _progress["within"] = {"done": done, "total": total, "unit": unit}
        _tell()


def _tell(*, at_once: bool = False) -> None:
    beat()
    attempt = os.environ.get(ATTEMPT)
    if attempt and (at_once or time.monotonic() - _last[PROGRESS] > BEAT_SECONDS / 2):
        _last[PROGRESS] = time.monotonic()
        with contextlib.suppress(OSError):
            write_atomically(Path(attempt, PROGRESS), json.dumps(_progress).encode(), durable=False)


def report_failure(kind: FailureKind, text: str, folder: Path | None = None) -> None:
    """Leave the reason of this process's end; of several processes' reasons the first is the one that is told.

    `folder`: where, if not in the attempt's directory that the environment names.
    """
    if attempt := folder or os.environ.get(ATTEMPT):
        record = {"kind": kind, "text": text, "rank": os.environ.get("RANK", "0"), "time": time.time()}
        write_atomically(Path(attempt, f"failure-{process_name()}.json"), json.dumps(record).encode())


def fail(error: BaseException) -> int:
    """Say on stderr and in the attempt's directory why this process ends, and return its exit code.

    A traceback is shown where the error does not explain itself: it is a defect, or an accident nobody foresaw.
    """
    stopping.ignore()  # a rank is asked to stop by others, by its launcher, and by a scheduler
    code, kind, text = reason(error)
    with contextlib.suppress(OSError):  # where nobody reads it, or the log may not grow
        shown = text if kind == "stopped" or text.startswith("Traceback") else f"error: {text}"
        print(shown, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # on a full disk the message above has to do
        report_failure(kind, text)
    return code


def reason(error: BaseException) -> tuple[int, FailureKind, str]:
    """Exit code of a process that ends by an error, whose fault it is, and what to say of it."""
    if isinstance(error, stopping.Stopped):
        return int(str(error)), "stopped", stopping.MESSAGE
    if isinstance(error, Exception) and (mistake := as_user_error(error)):
        return UserError.exit_code, "user", str(mistake)
    if isinstance(error, TransientError):
        return 1, "transient", str(error)
    text = "".join(traceback.format_exception(error))
    return 1, "transient" if isinstance(error, Exception) and is_transient(error) else "error", text
