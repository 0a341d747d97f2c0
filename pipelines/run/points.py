"""Records and reads the points of a run's stages: metrics.jsonl has each once, in order of arrival."""

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec

from contracts.points import METRICS, Point, decode_points
from contracts.tailing import appending

EVAL = "eval/"


class PointStream:
    """The points of a run on disk. Several processes on several machines may record at once."""

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS
        self.known: set[tuple[str, str, str, int]] = set()
        """Identities of the points that this process has read or written."""
        self._offset = 0
        self._next = 0
        if self.path.exists():
            self._catch_up(self.path.read_bytes())
            if self._offset and not self.known:  # written by an earlier version; the evaluations' manifests have it all
                self.path.unlink()
                self._offset = 0

    def record(self, points: Iterable[Point]) -> None:
        """Append the points that are not there yet, numbered in the order of the stream and without values that are not
        finite."""
        new = {point.identity: point for point in points if point.identity not in self.known}
        if not new:
            return
        with appending(self.path) as file:
            file.seek(self._offset)
            self._catch_up(file.read())  # points of other processes
            lines: list[bytes] = []
            for point in new.values():
                if point.identity not in self.known:
                    numbers = {name: value for name, value in point.metrics.items() if math.isfinite(value)}
                    place = self._next + len(lines)
                    lines.append(msgspec.json.encode(msgspec.structs.replace(point, point=place, metrics=numbers)))
            content = b"".join(line + b"\n" for line in lines)
            file.write(content)
            file.flush()
            self._catch_up(content)

    def _catch_up(self, content: bytes) -> None:
        """Register the points in further content of the file."""
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for point in decode_points(whole):
            self.known.add(point.identity)
            self._next = max(self._next, point.point + 1)


def latest(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each stage under its latest key; points from before a stage ran again are left out."""
    found: dict[str, list[Point]] = {}
    for point in points:
        own = found.setdefault(point.stage, [])
        if own and own[0].key != point.key:
            own.clear()
        own.append(point)
    return found


def is_evaluation(point: Point) -> bool:
    """Whether a point holds the metrics of an evaluation rather than of one of the stages that it reads."""
    return any(name.startswith(EVAL) and "/" not in name.removeprefix(EVAL) for name in point.metrics)
