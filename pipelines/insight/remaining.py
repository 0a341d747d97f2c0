"""How long a run will still take, by what its stages took before.

A stage of a role that this run has had before, in an earlier iteration, is expected to take as long as the latest ones;
one that runs, by its progress. Stages are then started as the driver starts them. What nobody has seen yet cannot be
known: in the first iteration there is no answer.
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
"""How many stages of a role are asked: the median of the latest ones."""


def seconds_by_role(graph: Graph, events: Iterable[Event]) -> dict[str, float]:
    """What stages of each role took, by a run's events: the median of the latest ones."""
    seen: dict[str, list[float]] = {}
    for event in events:
        if isinstance(event, StagePublished) and event.stage in graph.nodes and event.seconds:
            seen.setdefault(graph.nodes[event.stage].role, []).append(event.seconds)
    return {role: statistics.median(seconds[-LATEST:]) for role, seconds in seen.items()}


class Remaining:
    """Keeps account of what stages took, from the run's events."""

    def __init__(self, graph: Graph, cluster: Cluster, followers: Streams = MappingProxyType({})) -> None:
        self._graph = graph
        self._order = graph.by_urgency()
        self._cluster = cluster
        self._followers = followers
        self._seconds: dict[str, list[float]] = {}
        self.done: set[str] = set()
        self.started: dict[str, float] = {}
        """When the stages began that run."""

    def note(self, events: list[Event]) -> None:
        """Take note of more events."""
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
        """Seconds until the end; None where a stage is of a role that has not been seen.

        Args:
            shares: how far the running stages are, from 0 to 1.
            published: stages that are done, besides those that the events tell of.
        """
        done = {*self.done, *published}
        expected: dict[str, float] = {}
        for node in self._order:
            if node.name not in done:
                own = self._of_running(node.name, shares.get(node.name), self._seconds.get(node.role))
                if own is None:
                    return None
                expected[node.name] = own
        running = [name for name in self.started if name in expected]
        times = schedule(self._order, self._cluster, expected, running, done, self._followers)
        return max((end for _, end in times.values()), default=0.0)

    def _of_running(self, name: str, share: float | None, known: list[float] | None) -> float | None:
        whole = statistics.median(known[-LATEST:]) if known else None
        if name not in self.started:
            return whole
        spent = max(0.0, time.time() - self.started[name])
        if whole is not None:
            return max(whole - spent, 0.0 if share is None else whole * (1 - share) * 0.5)
        return spent * (1 - share) / share if share else None


def in_words(seconds: float | None) -> str:
    """A remaining time as people say it; nothing where it is not known, or over."""
    if not seconds:
        return ""
    if seconds < 90:
        return f"about {max(1, round(seconds / 10)) * 10} s left"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min left"
    return f"about {seconds / 3600:.1f} h left"
