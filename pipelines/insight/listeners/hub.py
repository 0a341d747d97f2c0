"""Pushes what the run publishes to the Hugging Face Hub, in a separate process, if the section `hub` says so."""

import os
import time

from pipelines.config.sections import HubSection
from pipelines.execution.listeners import Listen
from pipelines.graph import Graph, tag_of
from pipelines.hub.background import command
from pipelines.hub.uploads import LOG, ready
from pipelines.insight.readers import ReaderProcess
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, ListenerFailed, RunEnded, StagePublished, StageReused, pushed_to_hub


def listen(run: RunDirectory, graph: Graph) -> Listen:
    """Listen to evaluations: they are what completes an iteration."""
    section = run.config.hub_repos
    return (lambda events: None) if section is None else HubListener(run, graph, section)


class HubListener:
    """Starts the process that pushes, as soon as an iteration is complete that is not on the Hub."""

    def __init__(self, run: RunDirectory, graph: Graph, section: HubSection) -> None:
        self._run = run
        self._graph = graph
        self._section = section
        self._process: ReaderProcess | None = None
        self._interrupted = False

    def __call__(self, events: list[Event]) -> None:
        """Start the process when there is something to push, and record its failure."""
        self._interrupted |= any(
            isinstance(event, RunEnded) and event.outcome not in ("finished", "stopped") for event in events
        )
        if self._process is not None and (error := self._process.failure()):
            self._process = None
            self._run.record(ListenerFailed(listener="pipelines.hub", error=error))
        if self._process is None and any(map(self._completes_iteration, events)) and self._has_unpushed():
            start = command(self._run)
            self._process = ReaderProcess(start, os.environ, b"", self._run.path / LOG)

    def close(self) -> None:
        """Let the process end when it has pushed everything, and wait for it unless the run was interrupted."""
        if self._process is not None:
            self._process.end_input()
            if not self._interrupted:
                self._process.wait_until(time.monotonic() + self._section.wait_seconds)

    def _completes_iteration(self, event: Event) -> bool:
        if not isinstance(event, StagePublished | StageReused) or event.stage not in self._graph.nodes:
            return False
        return self._graph.nodes[event.stage].stage.name == "evaluation"

    def _has_unpushed(self) -> bool:
        """Whether something is published that is not known to be on the Hub."""
        there = pushed_to_hub(self._run.events())
        return any((repo, tag_of(number)) not in there for repo, _, number in ready(self._run, self._section))
