"""Reads the progress and the outcome of an attempt at a stage from the files that its supervisors leave."""

import json
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from contracts.attempt import FAILURES, PROGRESS, FailureKind
from contracts.points import REPORTS, decode_reports
from contracts.stopping import SIGNALS, TERMINAL

PUBLISHER = "publisher"
"""Folder of the supervisor that publishes the output of an attempt's tasks."""
PART = re.compile(rf"task-\d+|{PUBLISHER}")
COUNTED = {"done": int, "total": int, "unit": str}
LAST_BYTES = 1 << 14
"""Bytes read from the end of a file of reports; many times the length of a report."""
SEVERITY: dict[FailureKind, int] = {"user": 0, "transient": 1, "error": 2, "stopped": 3}
"""Order in which failures explain each other: the lowest is the cause."""


@dataclass(frozen=True)
class Ending:
    """Outcome of an attempt that published nothing."""

    kind: FailureKind
    how: str
    """The outcome in words: "failed with exit code 1."."""
    reason: str | None
    """The error message of the first failing process, if it left one."""


def ending_of(attempt: Path) -> Ending:
    """The outcome of an attempt that published nothing, with the kind of failure."""
    endings = [_ending_of_part(part) for part in parts_of(attempt)]
    bad = [ending for ending in endings if ending is not None]
    if not bad:
        return Ending("transient", "left no outcome: its supervisor was killed.", None)
    failure = failure_of(attempt)
    if failure is None:
        return min(bad, key=lambda ending: SEVERITY[ending.kind])
    how = next((ending.how for ending in bad if ending.reason == failure["text"]), bad[0].how)
    return Ending(failure["kind"], how, failure["text"])


def has_begun(attempt: Path) -> bool:
    """Whether a process of an attempt has been started."""
    return any((part / "stage.log").is_file() for part in parts_of(attempt))


def parts_of(attempt: Path) -> list[Path]:
    """The folders in which an attempt's supervisors keep their files, tasks first."""
    found = [path for path in attempt.iterdir() if PART.fullmatch(path.name)] if attempt.is_dir() else []
    return sorted(found, key=lambda path: (path.name == PUBLISHER, len(path.name), path.name)) or [attempt]


def _ending_of_part(part: Path) -> Ending | None:
    """The outcome of one supervisor's command; None if it succeeded."""
    failure = _first_failure([part])
    if not (part / "exit.json").exists():
        kind: FailureKind = "transient"
        killed = "left no outcome: its supervisor was killed."
        how = killed if failure is None else "failed before its command had ended."
    else:
        record = _read(part / "exit.json", {"code": int})
        if record is None:
            how, kind = "ended, but its exit.json cannot be read.", "transient"
        elif record["code"] == 0:
            return None
        else:
            how, kind = _how(record["code"], record.get("stalled"))
    return Ending(kind, how, None) if failure is None else Ending(failure["kind"], how, failure["text"])


def _how(code: int, stalled: float | None) -> tuple[str, FailureKind]:
    if stalled is not None:
        return (
            f"showed no activity for {stalled:g} s and was ended (executor.stall_seconds); the log has its tracebacks.",
            "transient",
        )
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return (
            "was killed by SIGKILL: by the system if memory ran out (see dmesg), or by a user.",
            "transient",
        )
    stops = {sign * number + offset for number in (*SIGNALS, *TERMINAL) for sign, offset in ((-1, 0), (1, 128))}
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}.", "stopped" if code in stops else "transient"
    return f"failed with exit code {code}.", "stopped" if code in stops else "error"


def failure_of(attempt: Path) -> dict[str, Any] | None:
    """The failure record that explains the other failures of an attempt.

    A user's mistake or a transient failure is the cause if there is one, since the messages of the other processes
    follow from it. Among failures of the same kind the first counts.
    """
    tasks = [part for part in parts_of(attempt) if part.name != PUBLISHER]
    found, later = _first_failure(tasks), _first_failure([attempt / PUBLISHER])
    # A transient failure of the publisher only says that output of the tasks is missing.
    if found is None or (found["kind"] == "stopped" and later is not None and later["kind"] != "transient"):
        return later
    return found


def _first_failure(parts: list[Path]) -> dict[str, Any] | None:
    found = [
        _read(path, {"kind": str, "text": str, "time": (int, float)}) for part in parts for path in part.glob(FAILURES)
    ]
    records = [record for record in found if record is not None and record["kind"] in SEVERITY]
    return min(records, key=lambda record: (SEVERITY[record["kind"]], record["time"]), default=None)


def _read(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any] | None:
    """Read a small file of a stage or its supervisor; None if it is torn or has other content."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if _is_record(record, fields) else None


def _is_record(value: Any, fields: Mapping[str, type | tuple[type, ...]]) -> TypeGuard[dict[str, Any]]:
    """Whether a decoded value is an object with these fields of these types."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in fields.items())


def log_of(attempt: Path) -> Path:
    """The log to read first: of the part that failed, else of the last part that has one."""
    parts = parts_of(attempt)
    failed = [part for part in parts if _ending_of_part(part) is not None and any(part.glob(FAILURES))]
    logged = [part for part in reversed(parts) if (part / "stage.log").is_file()]
    return [*failed, *logged, attempt][0] / "stage.log"


def progress_of(attempt: Path) -> str | None:
    """Reported progress of an attempt: "3/8 shards" or "3/8 shards, 17/64 samples of the next"; None: nothing yet."""
    furthest = _furthest(attempt)
    if furthest is None:
        return None
    within = furthest.get("within")
    more = f", {within['done']}/{within['total']} {within['unit']} of the next" if _is_record(within, COUNTED) else ""
    return f"{furthest['done']}/{furthest['total']} {furthest['unit']}{more}"


def fraction_done(attempt: Path) -> float:
    """The reported progress of an attempt as a fraction from 0 to 1."""
    furthest = _furthest(attempt)
    return furthest["done"] / furthest["total"] if furthest is not None and furthest["total"] else 0.0


def latest_metrics(attempt: Path) -> dict[str, float]:
    """The metrics that an attempt reported last, by the stage's own names; empty if there are none."""
    files = list(attempt.rglob(REPORTS))
    if not files:
        return {}
    latest = max(files, key=lambda file: file.stat().st_mtime_ns)
    with latest.open("rb") as content:
        content.seek(max(0, latest.stat().st_size - LAST_BYTES))
        reports = decode_reports(content.read())
    return reports[-1].metrics if reports else {}


def _furthest(attempt: Path) -> dict[str, Any] | None:
    found = [_read(part / PROGRESS, COUNTED) for part in parts_of(attempt)]
    return max((record for record in found if record is not None), key=lambda record: record["done"], default=None)


def log_tail(attempt: Path) -> str:
    """The end of an attempt's stage log, or of its jobs' output if the stage did not start."""
    log = log_of(attempt)
    return "\n".join(tail(path) for path in [log, *sorted(attempt.glob("*_log.out"))][: 1 if log.is_file() else None])


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log."""
    if not log.is_file():
        return "(it left no log: its process did not start)"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
