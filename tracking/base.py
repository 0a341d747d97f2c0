"""What a tracker is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from contracts.points import Point

POINT = "system/point"
"""Metric with a point's place in metrics.jsonl, where a tracker has no step of its own for it."""


@dataclass(frozen=True)
class TrackedRun:
    """The run whose metrics are shown."""

    id: str
    """What tells it from all other runs."""
    name: str
    directory: Path
    config: dict[str, Any]
    """What the user has set."""

    @property
    def own(self) -> Path:
        """Where trackers keep what belongs to the run."""
        return self.directory / "tracking"


class Tracker(Protocol):
    """One tracker, open for one run. Opening it makes the run there, or goes on with it."""

    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        """Open it; `settings` has all keys of its section, as plain data."""
        ...

    def recorded(self) -> int:
        """How many points are there: the place in the stream of the first that is not."""
        ...

    def log(self, points: list[Point]) -> None:
        """Send points, in order."""
        ...

    def close(self) -> None:
        """Wait until all is sent."""
        ...


def axes(point: Point) -> dict[str, int]:
    """The numbers by which metrics can be plotted."""
    return {"iteration": point.iteration, "global_step": point.global_step, "stage_step": point.number}
