"""Defines the metrics of a run: the reports that stages write while they work, and the points that the run collects.

Each process of a stage appends `Report`s to a file of its own in the attempt's directory. The driver (or, in a detached
run, its jobs) collects these into the run's metrics.jsonl, one `Point` per line, each exactly once. Trackers, hooks and
reports read that file.
"""

import contextlib
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

P = TypeVar("P")

METRICS = "metrics.jsonl"
"""Name of the file with a run's points, in the run's directory."""
REPORTS = "metrics-*.jsonl"
"""Pattern of the report files in an attempt's directory, one per process."""

KEY_LENGTH = 12
"""Number of characters of the stage key in a point."""

Unit = Literal["step", "shard", "stage"]
"""The unit of a point: an optimizer step, a shard of rows, or a stage that has published."""


class Report(msgspec.Struct, frozen=True):
    """Metrics of one step or shard, from the process that computed it."""

    unit: Unit
    number: int
    """Number of the step (from 1) or shard (from 0) within the stage."""
    time: float
    """Seconds since 1970."""
    metrics: dict[str, float]
    """Values by the stage's own names."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics of one step, shard or stage of a run; a line of metrics.jsonl."""

    point: int
    """Index in metrics.jsonl, from 0. Trackers use it as their step, and so know which points they already have."""
    time: float
    """Time of the report, in seconds since 1970."""
    stage: str
    """Path of the stage's output, relative to the run's directory."""
    key: str
    """Beginning of the stage key; a stage that was rerun under another key has points of both."""
    unit: Unit
    number: int
    """Number of the step (from 1) or shard (from 0); 0 for a stage."""
    iteration: int
    """Number of the iteration; 0 for stages before the first."""
    global_step: int
    """Optimizer steps of the policy so far, over all iterations."""
    metrics: dict[str, float]
    """Values by name; the names are grouped: eval/, train/, data/, system/."""

    @property
    def identity(self) -> tuple[str, str, Unit, int]:
        """The fields that identify a point within a run."""
        return self.stage, self.key, self.unit, self.number


_POINTS = msgspec.json.Decoder(Point)
_REPORTS = msgspec.json.Decoder(Report)


def decode_points(content: bytes) -> list[Point]:
    """Decode the lines of metrics.jsonl; lines that are not points are skipped."""
    return _decoded(content, _POINTS)


def read_points(run: Path) -> list[Point]:
    """Read all points of a run, in order; none if it has no metrics yet."""
    path = run / METRICS
    return decode_points(path.read_bytes()) if path.exists() else []


def decode_reports(content: bytes) -> list[Report]:
    """Decode the lines of an attempt's report file; a line that a killed process did not finish is skipped."""
    return _decoded(content, _REPORTS)


def _decoded(content: bytes, decoder: msgspec.json.Decoder[P]) -> list[P]:
    found = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            found.append(decoder.decode(line))
    return found
