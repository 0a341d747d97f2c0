"""Writes report.txt, the output of `pipeline status`, when the run ends."""

from pipelines.execution.listeners import Listen
from pipelines.graph import Graph
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, RunEnded


def listen(run: RunDirectory, graph: Graph) -> Listen:
    """Listen to the end of a run."""

    def write_report(events: list[Event]) -> None:
        if any(isinstance(event, RunEnded) for event in events):
            from pipelines.insight.status import save_report  # imports what only the last job needs

            save_report(run, graph)

    return write_report
