"""Defines the interface of trackers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from contracts.points import Point

POINT = "system/point"
"""The metric with a point's index in metrics.jsonl, for trackers whose own step is something else."""


@dataclass(frozen=True)
class TrackedRun:
    """The run whose metrics are sent."""

    id: str
    """An id that is unique among all runs."""
    name: str
    directory: Path
    config: dict[str, Any]
    """The keys that the user has set."""

    @property
    def tracking_directory(self) -> Path:
        """The directory in which trackers keep files of this run."""
        return self.directory / "tracking"


class Tracker(Protocol):
    """A tracker that is open for one run. Opening it creates the run in the tracker, or continues it."""

    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        """Open the tracker.

        Args:
            settings: all keys of its section, as plain data.
        """
        ...

    def recorded(self) -> int:
        """The number of points that the tracker already has, which is the index of the first one to send."""
        ...

    def log(self, points: list[Point]) -> None:
        """Send points, in order."""
        ...

    def close(self) -> None:
        """Wait until everything is sent."""
        ...


def axes(point: Point) -> dict[str, int]:
    """The values of the axes that metrics can be plotted by."""
    return {"iteration": point.iteration, "global_step": point.global_step, "stage_step": point.number}
