"""Reports heartbeats, progress, metrics and failures of a supervised stage in the directory of its attempt.

A stage that is run by hand has no such directory and reports nothing.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from contracts import stopping
from contracts.errors import TransientError, UserError, as_user_error, is_transient
from contracts.files import process_name, write_atomically
from contracts.points import REPORTS, Report, Unit

ATTEMPT = "RATCHET_ATTEMPT"
"""Environment variable: the directory of the attempt."""
ROLE = "RATCHET_ROLE"
"""Environment variable: this process's role in a stage that works in shards (`contracts.stage.WorkerRole`); if unset,
the process does everything."""
STALL = "RATCHET_STALL_SECONDS"
"""Environment variable: seconds without a heartbeat after which this stage is killed; if unset, it never is."""
HEARTBEAT = "heartbeat"
PROGRESS = "progress.json"
FAILURES = "failure-*.json"
BEAT_SECONDS = 1.0

FailureKind = Literal["user", "transient", "stopped", "error"]
"""A user's mistake, a transient failure of the machine or the network, a requested stop, or a bug."""


def supervised() -> bool:
    """Whether a supervisor watches this stage and retries it after a transient failure."""
    return bool(os.environ.get(ATTEMPT))


_last = {HEARTBEAT: 0.0, PROGRESS: 0.0}
_progress: dict[str, Any] = {}


def beat() -> None:
    """Send a heartbeat; cheap enough for every batch. A stage without heartbeats for too long counts as stalled."""
    attempt = os.environ.get(ATTEMPT)
    if attempt and time.monotonic() - _last[HEARTBEAT] > BEAT_SECONDS:
        _last[HEARTBEAT] = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk, or deleted logs, must not stop the work
            Path(attempt, HEARTBEAT).touch()


def report_progress(done: int, total: int, unit: str) -> None:
    """Report progress; cheap enough for every step."""
    _progress.clear()
    _progress.update({"done": done, "total": total, "unit": unit})
    _write_progress(at_once=done == total)


def report_within(done: int, total: int, unit: str) -> None:
    """Report progress within the current unit of `report_progress`; call it only if that progress survives a kill."""
    if _progress:  # otherwise another process of this stage reports
        _progress["within"] = {"done": done, "total": total, "unit": unit}
        _write_progress()


def _write_progress(*, at_once: bool = False) -> None:
    beat()
    attempt = os.environ.get(ATTEMPT)
    if attempt and (at_once or time.monotonic() - _last[PROGRESS] > BEAT_SECONDS / 2):
        _last[PROGRESS] = time.monotonic()
        with contextlib.suppress(OSError):
            write_atomically(Path(attempt, PROGRESS), json.dumps(_progress).encode(), durable=False)


def report_metrics(unit: Unit, number: int, metrics: Mapping[str, float]) -> None:
    """Report the metrics of a step (from 1) or a shard (from 0) immediately; cheap enough for every step.

    Call it before the step or shard is saved, so that a kill cannot leave one that was never reported. A step or shard
    that is recomputed is reported again, with the same numbers.
    """
    attempt = os.environ.get(ATTEMPT)
    if attempt:
        report = Report(unit, number, round(time.time(), 3), dict(metrics))
        path = Path(attempt, REPORTS.replace("*", process_name()))
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:  # as in `beat`
            file.write(msgspec.json.encode(report) + b"\n")


def report_failure(kind: FailureKind, text: str, folder: Path | None = None) -> None:
    """Record why this process failed; if several processes do, the supervisor shows the first.

    `folder`: the attempt's directory, if it is not the one named by the environment.
    """
    if attempt := folder or os.environ.get(ATTEMPT):
        record = {"kind": kind, "text": text, "rank": os.environ.get("RANK", "0"), "time": time.time()}
        write_atomically(Path(attempt, f"failure-{process_name()}.json"), json.dumps(record).encode())


def fail(error: BaseException) -> int:
    """Report on stderr and in the attempt's directory why this process fails; return its exit code.

    A traceback is shown for bugs, and for transient failures without a message of their own.
    """
    stopping.ignore()  # other ranks, the launcher and the scheduler may all send further stop signals
    code, kind, text = reason(error)
    with contextlib.suppress(OSError):  # stderr is closed, or the disk is full
        shown = text if kind == "stopped" or text.startswith("Traceback") else f"error: {text}"
        print(shown, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # on a full disk the message above must suffice
        report_failure(kind, text)
    return code


def reason(error: BaseException) -> tuple[int, FailureKind, str]:
    """Exit code, kind and message of an error that ends a process."""
    if isinstance(error, stopping.Stopped):
        return int(str(error)), "stopped", stopping.MESSAGE
    if isinstance(error, Exception) and (mistake := as_user_error(error)):
        return UserError.exit_code, "user", str(mistake)
    if isinstance(error, TransientError):
        return 1, "transient", str(error)
    text = "".join(traceback.format_exception(error))
    return 1, "transient" if isinstance(error, Exception) and is_transient(error) else "error", text
