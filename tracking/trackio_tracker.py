"""trackio: a local database, or a Space of the Hub."""

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from contracts.points import Point
from tracking.base import TrackedRun, axes

KEEPING = ("persist-", "write-")
"""What its warnings' keys begin with where it could not keep something on this machine."""


class TrackioTracker:
    """A run of trackio. Its step is the place of a point in the stream.

    trackio only warns of what it could not write, so that training goes on. Nothing trains in this process: such a
    warning ends it, and the next one goes on from what was written. What cannot be sent to a Space is no such thing as
    long as trackio can keep it: it sends that later by itself.
    """

    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        if settings["directory"] is not None:
            os.environ["TRACKIO_DIR"] = settings["directory"]  # before it is imported
        import trackio

        project, name = settings["project"], settings["name"] or f"{run.name}-{run.id}"
        self._is_local = settings["space_id"] is None
        waiting = _last_waiting(project, name)  # before the database is looked into, where they come next
        with warnings.catch_warnings(record=True) as told:
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
        said = [str(warning.message) for warning in told if Path(warning.filename).is_relative_to(own)]
        self._failures = said if self._is_local else []
        self._run._warn_once = self._note
        self._check()
        found = self._run._next_step  # in the database, of an earlier process; nothing public says it
        if not found and self._is_local:
            self._run.id = run.id  # the same for all processes, although what waits is not found by them
        self._recorded = max(found, waiting + 1)

    def recorded(self) -> int:
        """What trackio has found when it took the run up again."""
        return int(self._recorded)

    def log(self, points: list[Point]) -> None:
        """Write the points into the database, all or none of them; for a Space, hand them to trackio's own thread.

        Raises:
            RuntimeError: trackio could not write these, or keep earlier ones.
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

    def _note(self, key: str, message: str) -> None:
        """Instead of trackio's own warning."""
        print(message, file=sys.stderr)
        if self._is_local or key.startswith(KEEPING):
            self._failures.append(message.partition(" User code will continue")[0])  # none is here

    def _check(self) -> None:
        if self._failures:
            raise RuntimeError(self._failures[0])


def _last_waiting(project: str, name: str) -> int:
    """The last step of a run in the files that wait for the database: on a file system of the network trackio writes
    such files, which its dashboard takes in. -1 if there is none."""
    from trackio import fragments

    last = -1
    for file in fragments.local_inbox_dir().rglob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # it has been taken in
            for record in fragments.parse_fragment_bytes(file.read_bytes()):
                if (record["project"], record["run"]) == (project, name):
                    last = max(last, record["step"])
    return last
