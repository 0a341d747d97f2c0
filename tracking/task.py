"""What a tracker's process is told. No tracker's library is imported here, since the driver reads it too; nor are
configs, since every such process does."""

from pathlib import Path
from typing import Any

import msgspec

MARK = "RATCHET_TRACKER"
"""Environment variable of a tracker's process and of those that its library starts: the run and the tracker."""


class TrackingTask(msgspec.Struct):
    """One tracker of one run."""

    tracker: str
    run_id: str
    name: str
    directory: str
    settings: dict[str, Any]
    """All keys of its section (tracking/config.py), as plain data."""
    config: dict[str, Any]


def sent_file(run: Path, tracker: str) -> Path:
    """Where a tracker's process notes how many bytes of metrics.jsonl its tracker has."""
    return run / "tracking" / f"{tracker}.sent"
