"""Sends metrics to trackio: to a local database, or to a Space of the Hub."""

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from contracts.points import Point
from tracking.base import TrackedRun, axes

KEEPING = ("persist-", "write-")
"""Prefixes of the keys of trackio's warnings about data that it could not store on this machine."""


class TrackioTracker:
    """A trackio run. Its step is a point's index in metrics.jsonl.

    If trackio cannot write something it only warns, so that training continues. Nothing trains in this process, so such
    a warning ends it, and the next process resumes after the last point that was written. Data that cannot be sent to a
    Space is no error as long as trackio stores it, since it sends that later on its own.
    """

    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        if settings["directory"] is not None:
            os.environ["TRACKIO_DIR"] = settings["directory"]  # before it is imported
        import trackio

        project, name = settings["project"], settings["name"] or f"{run.name}-{run.id}"
        self._is_local = settings["space_id"] is None
        waiting = _last_waiting(project, name)  # read before the database, because waiting files are moved into it
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._run = trackio.init(
                project=project,
                name=name,
                group=settings["group"],
                space_id=settings["space_id"],
                config=run.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        own = Path(trackio.__file__).parent
        messages = [str(warning.message) for warning in caught if Path(warning.filename).is_relative_to(own)]
        self._failures = messages if self._is_local else []
        self._run._warn_once = self._record_warning
        self._check()
        next_step = self._run._next_step  # from an earlier process, in the database; there is no public API for it
        if not next_step and self._is_local:
            self._run.id = run.id  # so that all processes use the same id, although trackio does not see waiting files
        self._recorded = max(next_step, waiting + 1)

    def recorded(self) -> int:
        """The number of points that trackio had when it resumed the run."""
        return int(self._recorded)

    def log(self, points: list[Point]) -> None:
        """Write the points into the database, all or none of them; for a Space, hand them to trackio's own thread.

        Raises:
            RuntimeError: trackio could not write these points, or store earlier ones.
        """
        with self._run._client_lock:  # trackio's own thread takes it to write queued points
            for point in points:
                self._run.log({**point.metrics, **axes(point)}, step=point.point)
            if self._is_local:
                self._run._flush_queues_inline()
        self._check()

    def close(self) -> None:
        """Wait until trackio's own thread has sent everything.

        Raises:
            RuntimeError: trackio could not write or store a point.
        """
        self._run.finish()
        self._check()

    def _record_warning(self, key: str, message: str) -> None:
        """Replace trackio's own warning method."""
        print(message, file=sys.stderr)
        if self._is_local or key.startswith(KEEPING):
            self._failures.append(message.partition(" User code will continue")[0])  # there is no user code here

    def _check(self) -> None:
        if self._failures:
            raise RuntimeError(self._failures[0])


def _last_waiting(project: str, name: str) -> int:
    """The last step of a run in files that wait to be moved into the database, or -1. On network file systems trackio
    writes such files, and its dashboard imports them."""
    from trackio import fragments

    last = -1
    for file in fragments.local_inbox_dir().rglob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # it has just been imported
            for record in fragments.parse_fragment_bytes(file.read_bytes()):
                if (record["project"], record["run"]) == (project, name):
                    last = max(last, record["step"])
    return last
