"""Writes report.txt, the report of `pipeline status`, when nobody works on the run any more."""

from pipelines.execution.listeners import Listen
from pipelines.graph import Graph
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, RunEnded


def listen(run: RunDirectory, graph: Graph) -> Listen:
    """Listen to the end of a run."""

    def write_report(events: list[Event]) -> None:
        if any(isinstance(event, RunEnded) for event in events):
            from pipelines.insight.status import save_report  # tables, which no earlier job needs

            save_report(run, graph)

    return write_report
