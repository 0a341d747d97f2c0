"""metrics.jsonl of a run: the points of all its stages, each once, in the order in which they came."""

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec

from contracts.points import METRICS, Point, decode_points
from contracts.tailing import appending

EVAL = "eval/"


class PointStream:
    """The points of a run, on its disk. Several processes, also on several machines, may record at once."""

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS
        self.known: set[tuple[str, str, str, int]] = set()
        """Identities of the points that were there when this process looked last."""
        self._offset = 0
        self._next = 0
        if self.path.exists():
            self._catch_up(self.path.read_bytes())
            if self._offset and not self.known:  # of an earlier version: all of it is in the evaluations' manifests
                self.path.unlink()
                self._offset = 0

    def record(self, points: Iterable[Point]) -> None:
        """Append those that are not there yet; their places in the stream are filled in, and what is no number left
        out."""
        new = {point.identity: point for point in points if point.identity not in self.known}
        if not new:
            return
        with appending(self.path) as file:
            file.seek(self._offset)
            self._catch_up(file.read())  # of others
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
        """Take note of more of the file's content."""
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for point in decode_points(whole):
            self.known.add(point.identity)
            self._next = max(self._next, point.point + 1)


def latest(points: Iterable[Point]) -> dict[str, list[Point]]:
    """By stage, the points of its latest key: what holds, where a stage was made again."""
    found: dict[str, list[Point]] = {}
    for point in points:
        own = found.setdefault(point.stage, [])
        if own and own[0].key != point.key:
            own.clear()
        own.append(point)
    return found


def is_evaluation(point: Point) -> bool:
    """Whether a point has the metrics of an evaluation, rather than of one of the stages that it judges by."""
    return any(name.startswith(EVAL) and "/" not in name.removeprefix(EVAL) for name in point.metrics)
