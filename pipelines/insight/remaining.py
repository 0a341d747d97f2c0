"""How long a run will still take, by what its stages took before.

A stage of a role that this run has had before, in an earlier iteration, is expected to take as long as the latest ones;
one that runs, by its progress. Stages are then started as the driver starts them, so many at once. What nobody has seen
yet cannot be known: in the first iteration there is no answer.
"""

import heapq
import statistics
import time
from collections.abc import Collection, Mapping

from pipelines.graph import Graph
from pipelines.run.events import Event, StageInvalidated, StagePublished, StageReused, StageStarted

LATEST = 3
"""How many stages of a role are asked: the median of the latest ones."""


class Remaining:
    """Keeps account of what stages took, from the run's events."""

    def __init__(self, graph: Graph, parallel: int) -> None:
        self._graph = graph
        self._parallel = max(1, parallel)
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
        left = {name: node for name, node in self._graph.nodes.items() if name not in done}
        expected: dict[str, float] = {}
        for name, node in left.items():
            known = self._seconds.get(node.role)
            own = self._of_running(name, shares.get(name), known)
            if own is None:
                return None
            expected[name] = own
        running = [name for name in left if name in self.started]
        ends = [(expected[name], name) for name in running]
        heapq.heapify(ends)
        waiting = {name: sum(need in left for need in node.needs) for name, node in left.items()}
        dependents: dict[str, list[str]] = {}
        for name, node in left.items():
            for need in node.needs:
                dependents.setdefault(need, []).append(name)
        ready = [name for name in left if name not in self.started and not waiting[name]]
        now = 0.0
        while ends or ready:
            while ready and len(ends) < self._parallel:
                name = ready.pop(0)
                heapq.heappush(ends, (now + expected[name], name))
            now, ended = heapq.heappop(ends)
            for name in dependents.get(ended, ()):
                waiting[name] -= 1
                if not waiting[name] and name not in self.started:
                    ready.append(name)
        return now

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
