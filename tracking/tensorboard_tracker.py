"""Writes metrics to TensorBoard's event files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from contracts.points import Point
from tracking.base import POINT, TrackedRun


class TensorboardTracker:
    """A folder of event files, one per process that has written. A point is one event, so it is written completely or
    not at all."""

    def __init__(self, run: TrackedRun, settings: dict[str, Any]) -> None:
        folder = (
            Path(settings["directory"], run.name) if settings["directory"] else run.tracking_directory / "tensorboard"
        )
        folder.mkdir(parents=True, exist_ok=True)
        indices = (int(values[POINT]) for file in sorted(folder.glob("*tfevents*")) for _, values in scalars(file))
        self._recorded = max(indices, default=-1) + 1
        self._writer = EventFileWriter(str(folder))

    def recorded(self) -> int:
        """The number of points in the files of earlier processes."""
        return self._recorded

    def log(self, points: list[Point]) -> None:
        """Write one event for each point."""
        for point in points:
            metrics = {POINT: point.point, "system/iteration": point.iteration, **point.metrics}
            values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            event = Event(wall_time=point.time, step=point.global_step, summary=Summary(value=values))
            self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


def scalars(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the step and values of each point in a file, without a last one that a killed process left incomplete."""
    for event in EventFileLoader(str(file)).Load():
        values = {value.tag: value.tensor.float_val[0] for value in event.summary.value if value.tensor.float_val}
        if POINT in values:
            yield event.step, values
