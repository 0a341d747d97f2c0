"""Metrics of a run as a stream of points: what stages report while they work, and what a run records of all of them.

A stage's processes append `Report`s to files of their own in the attempt's directory. Whoever drives the run collects
these into the run's metrics.jsonl, one `Point` a line, each once. Trackers, hooks and reports read that file.
"""

import contextlib
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

P = TypeVar("P")

METRICS = "metrics.jsonl"
"""Name of the stream in a run's directory."""
REPORTS = "metrics-*.jsonl"
"""Names of the reports in an attempt's directory, one file per process."""

KEY = 12
"""Characters of the stage key that a point has."""

Unit = Literal["step", "shard", "stage"]
"""What a point tells of: an optimizer step, a shard of rows, or a stage that has published."""


class Report(msgspec.Struct, frozen=True):
    """Metrics of one step or shard, from the process that made it."""

    unit: Unit
    number: int
    """Which step (from 1) or shard (from 0) of the stage."""
    time: float
    """Seconds since 1970."""
    metrics: dict[str, float]
    """By the stage's own names."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics of one step, shard or stage of a run; a line of metrics.jsonl."""

    point: int
    """Its place in the stream, from 0: trackers have it as their step, and so know what they have."""
    time: float
    """When it was reported, in seconds since 1970."""
    stage: str
    """Path of the stage's output below the run's directory."""
    key: str
    """Beginning of the stage key: a stage that was made again under another key has points of both."""
    unit: Unit
    number: int
    """Which step (from 1) or shard (from 0); 0 for a stage."""
    iteration: int
    """0 for what is made before the first."""
    global_step: int
    """Optimizer steps of the policy until then, over all iterations."""
    metrics: dict[str, float]
    """By names in groups: eval/, train/, data/, system/."""

    @property
    def identity(self) -> tuple[str, str, Unit, int]:
        """What no two points of a run have alike."""
        return self.stage, self.key, self.unit, self.number


_POINTS = msgspec.json.Decoder(Point)
_REPORTS = msgspec.json.Decoder(Report)


def decode_points(content: bytes) -> list[Point]:
    """The lines of metrics.jsonl, without those that are no points."""
    return _decoded(content, _POINTS)


def read_points(run: Path) -> list[Point]:
    """All points of a run, in order; none where it has no metrics yet."""
    path = run / METRICS
    return decode_points(path.read_bytes()) if path.exists() else []


def decode_reports(content: bytes) -> list[Report]:
    """The lines of an attempt's file, without one that a killed process did not end."""
    return _decoded(content, _REPORTS)


def _decoded(content: bytes, decoder: msgspec.json.Decoder[P]) -> list[P]:
    found = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            found.append(decoder.decode(line))
    return found
