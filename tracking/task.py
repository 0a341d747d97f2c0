"""Defines the message from the driver to a tracker's process. It imports no tracker's library, since the driver imports
this module, and no config classes, since every tracker's process does."""

from pathlib import Path
from typing import Any

import msgspec

MARK = "RATCHET_TRACKER"
"""The environment variable, with run and tracker, by which a tracker's process and its library's children are found."""


class TrackingTask(msgspec.Struct):
    """The tracker, and the run whose metrics it gets."""

    tracker: str
    run_id: str
    name: str
    directory: str
    settings: dict[str, Any]
    """All keys of the tracker's section (tracking/config.py), as plain data."""
    config: dict[str, Any]


def sent_file(run: Path, tracker: str) -> Path:
    """The file in which a tracker's process stores how many bytes of metrics.jsonl it has sent."""
    return run / "tracking" / f"{tracker}.sent"
