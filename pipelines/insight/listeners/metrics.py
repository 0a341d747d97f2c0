"""Keeps metrics.jsonl up to date while stages run and when they have ended."""

import time

from contracts.errors import DISK_FULL
from pipelines.execution.listeners import Listen
from pipelines.graph import Graph
from pipelines.insight.metrics_collector import Collector
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, StageFailed, StagePublished, StageReused, StageStarted

POLL_SECONDS = 1.0
"""Shortest time between two reads of what running stages report."""


def listen(run: RunDirectory, graph: Graph) -> Listen:
    """Collect what earlier commands have left uncollected, then what running stages report."""
    collector = Collector(run, graph)
    running: set[str] = set()
    ended = dict.fromkeys(graph.nodes)  # in order
    polled = -POLL_SECONDS

    def collect_metrics(events: list[Event]) -> None:
        nonlocal polled
        for event in events:
            match event:
                case StageStarted(stage=stage):
                    running.add(stage)
                case StagePublished(stage=stage) | StageReused(stage=stage) | StageFailed(stage=stage):
                    running.discard(stage)
                    ended[stage] = None
        try:
            for stage in list(ended):
                collector.finish(stage)
                del ended[stage]
            if running and time.monotonic() - polled > POLL_SECONDS:
                polled = time.monotonic()
                for stage in running:
                    collector.collect(stage)
        except OSError as error:
            if error.errno not in DISK_FULL:  # the next call tries again
                raise

    return collect_metrics
