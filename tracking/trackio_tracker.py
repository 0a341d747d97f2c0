"""trackio: a local database, or a Space of the Hub."""

import os
from typing import Any

from contracts.points import Point
from tracking.base import TrackedRun, axes


class TrackioTracker:
    """A run of trackio. Its step is the place of a point in the stream."""

    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        if settings["directory"] is not None:
            os.environ["TRACKIO_DIR"] = settings["directory"]  # before it is imported
        import trackio

        self._run = trackio.init(
            project=settings["project"],
            name=settings["name"] or f"{run.name}-{run.id}",
            group=settings["group"],
            space_id=settings["space_id"],
            config=run.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._recorded = self._run._next_step  # what it has found of an earlier process; nothing public says it

    def recorded(self) -> int:
        """What trackio has found when it took the run up again."""
        return int(self._recorded)

    def log(self, points: list[Point]) -> None:
        """Hand the points to trackio's own thread."""
        for point in points:
            self._run.log({**point.metrics, **axes(point)}, step=point.point)

    def close(self) -> None:
        """Wait until trackio's own thread has written everything."""
        self._run.finish()
