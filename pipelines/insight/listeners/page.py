"""Writes report.html when a policy was judged, and when nobody works on the run any more."""

import os
import sys
import time

from contracts.errors import DISK_FULL
from contracts.records import EVALUATION, ROLLOUTS
from pipelines.execution.listeners import Listen
from pipelines.graph import Graph
from pipelines.insight.readers import ReaderProcess
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, RunEnded, StageEvent, StagePublished

PAGE = "report.html"
QUICKLY = 8 << 20
"""Bytes of new answers up to which this process reads them itself: it has its libraries loaded already, and is busy for
well under a second. More is left to a process of its own, so that no stage waits."""
COMMAND = [sys.executable, "-P", "-m", "pipelines", "report"]
END_SECONDS = 600.0


def listen(run: RunDirectory, graph: Graph) -> Listen:
    """Listen to evaluations and to the end of a run."""
    return PageWriter(run, graph)


class PageWriter:
    """Writes the report, one at a time."""

    def __init__(self, run: RunDirectory, graph: Graph) -> None:
        self._run = run
        self._graph = graph
        self._last = max((node.iteration or 0 for node in graph.nodes.values()), default=0)
        self._changed = not (run.path / PAGE).exists()  # since the page was written
        self._judged = False  # a policy, since then; of the last one the end of the run tells
        self._unread = 0
        self._child: ReaderProcess | None = None

    def __call__(self, events: list[Event]) -> None:
        """Take note of what has happened, and write what is due; at the end of the run wait for it."""
        ended = any(isinstance(event, RunEnded) for event in events)
        for event in events:
            self._note(event)
        if self._child is not None and (ended or not self._child.running):
            self._reap()
        if self._child is None and (self._judged or (ended and self._changed)):
            self._write()
            if ended:
                self._reap()

    def _note(self, event: Event) -> None:
        if isinstance(event, RunEnded):
            self._changed = self._changed or event.outcome != "finished"
        if not isinstance(event, StageEvent) or event.stage not in self._graph.nodes:
            return
        node = self._graph.nodes[event.stage]
        if isinstance(event, StagePublished):
            self._changed = True
            self._judged = self._judged or (node.stage.schema == EVALUATION and node.iteration != self._last)
            if node.stage.schema == ROLLOUTS:
                self._unread += sum(path.stat().st_size for path in node.output.glob("shard-*"))

    def _write(self) -> None:
        far, self._unread, self._changed, self._judged = self._unread > QUICKLY, 0, False, False
        if far:
            command = [*COMMAND, str(self._run.path)]
            self._child = ReaderProcess(command, os.environ, b"", self._run.path / "logs" / "report.log")
            self._child.end_input()  # it reads what is there, and ends
            return
        from pipelines.insight.report.command import write_report

        try:
            write_report(self._run, self._graph, self._run.path / PAGE)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._changed = True

    def close(self) -> None:
        """Wait for the process that writes: a job of a cluster takes with it whatever it has started."""
        self._reap()

    def _reap(self) -> None:
        child, self._child = self._child, None
        if child is not None and (failure := child.wait(time.monotonic() + END_SECONDS)):
            raise RuntimeError(f"`pipeline report` failed: {failure}")
