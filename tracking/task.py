"""What a tracker's process is told. No tracker's library is imported here: the driver reads it too."""

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
    config: dict[str, Any]


def sent_file(run: Path, tracker: str) -> Path:
    """Where a tracker's process notes how many bytes of metrics.jsonl its tracker has."""
    return run / "tracking" / f"{tracker}.sent"
