"""trackio: a local database, or a Space of the Hub."""

import os
import warnings
from pathlib import Path
from typing import Any

from contracts.points import Point
from tracking.base import TrackedRun, axes


class TrackioTracker:
    """A run of trackio. Its step is the place of a point in the stream.

    trackio only warns of what goes wrong, so that training goes on. Nothing trains in this process: what it warns of
    ends it, and the next one goes on from what was written.
    """

    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        if settings["directory"] is not None:
            os.environ["TRACKIO_DIR"] = settings["directory"]  # before it is imported
        import trackio

        self._is_local = settings["space_id"] is None
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
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
        own = Path(trackio.__file__).parent
        self._failures = [str(warning.message) for warning in told if Path(warning.filename).is_relative_to(own)]
        self._run._warn_once = lambda key, message: self._failures.append(message)
        self._check()
        self._recorded = self._run._next_step  # what it has found of an earlier process; nothing public says it

    def recorded(self) -> int:
        """What trackio has found when it took the run up again."""
        return int(self._recorded)

    def log(self, points: list[Point]) -> None:
        """Write the points into the database, all or none of them; for a Space, hand them to trackio's own thread.

        Raises:
            RuntimeError: trackio could not write these, or send earlier ones.
        """
        with self._run._client_lock:  # which trackio's own thread takes in order to write what it finds
            for point in points:
                self._run.log({**point.metrics, **axes(point)}, step=point.point)
            if self._is_local:
                self._run._flush_queues_inline()
        self._check()

    def close(self) -> None:
        """Wait until trackio's own thread has sent everything.

        Raises:
            RuntimeError: it could not.
        """
        self._run.finish()
        self._check()

    def _check(self) -> None:
        if self._failures:
            raise RuntimeError(self._failures[0])
