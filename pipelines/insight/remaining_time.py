"""Estimates the remaining time of a run from the durations of its earlier stages.

A stage is expected to take as long as the latest stages of its role in earlier iterations; for a running stage, its
progress counts as well. The remaining stages are then scheduled as the driver schedules them. There is no estimate
while some stages are of roles that the run has not had yet, as in the first iteration.
"""

import statistics
import time
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from pipelines.graph import Graph
from pipelines.planning.cluster import Cluster
from pipelines.planning.scheduling import Streams, schedule
from pipelines.run.events import Event, StageInvalidated, StagePublished, StageReused, StageStarted

LATEST = 3
"""Number of the latest stages of a role whose median is the expected duration."""


def seconds_by_role(graph: Graph, events: Iterable[Event]) -> dict[str, float]:
    """The median seconds of the latest stages of each role, from a run's events."""
    seen: dict[str, list[float]] = {}
    for event in events:
        if isinstance(event, StagePublished) and event.stage in graph.nodes and event.seconds:
            seen.setdefault(graph.nodes[event.stage].role, []).append(event.seconds)
    return {role: statistics.median(seconds[-LATEST:]) for role, seconds in seen.items()}


class RemainingTime:
    """Keeps track of the durations of stages from the run's events, and estimates the remaining time."""

    def __init__(self, graph: Graph, cluster: Cluster, followers: Streams = MappingProxyType({})) -> None:
        self._graph = graph
        self._order = graph.by_urgency()
        self._cluster = cluster
        self._followers = followers
        self._seconds: dict[str, list[float]] = {}
        self.done: set[str] = set()
        self.started: dict[str, float] = {}
        """Start time of each running stage (seconds since 1970)."""

    def update(self, events: list[Event]) -> None:
        """Take further events into account."""
        for event in events:
            match event:
                case StageStarted(stage=stage):
                    self.started[stage] = event.time
                case StagePublished(stage=stage):
                    self.started.pop(stage, None)
                    self.done.add(stage)
                    if stage in self._graph.nodes and event.seconds:
                        self._seconds.setdefault(self._graph.nodes[stage].role, []).append(event.seconds)
                case StageReused(stage=stage):
                    self.done.add(stage)
                case StageInvalidated(stage=stage):
                    self.done.discard(stage)

    def seconds(self, shares: Mapping[str, float], published: Collection[str] = ()) -> float | None:
        """Seconds until the end of the run; None if some stage is of a role without a known duration.

        Args:
            shares: progress of the running stages, from 0 to 1.
            published: stages that are done, in addition to those that are so by the events.
        """
        done = {*self.done, *published}
        expected: dict[str, float] = {}
        for node in self._order:
            if node.name not in done:
                own = self._expected_seconds(node.name, shares.get(node.name), self._seconds.get(node.role))
                if own is None:
                    return None
                expected[node.name] = own
        running = [name for name in self.started if name in expected]
        times = schedule(self._order, self._cluster, expected, running, done, self._followers)
        return max((end for _, end in times.values()), default=0.0)

    def _expected_seconds(self, name: str, share: float | None, known: list[float] | None) -> float | None:
        whole = statistics.median(known[-LATEST:]) if known else None
        if name not in self.started:
            return whole
        spent = max(0.0, time.time() - self.started[name])
        if whole is not None:
            return max(whole - spent, 0.0 if share is None else whole * (1 - share) * 0.5)
        return spent * (1 - share) / share if share else None


def in_words(seconds: float | None) -> str:
    """A remaining time in words; empty if it is not known, or 0."""
    if not seconds:
        return ""
    if seconds < 90:
        return f"about {max(1, round(seconds / 10)) * 10} s left"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min left"
    return f"about {seconds / 3600:.1f} h left"
