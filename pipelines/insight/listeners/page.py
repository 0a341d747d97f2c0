"""Writes report.html when a policy has been evaluated, and when the run ends."""

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
INLINE_BYTES = 8 << 20
"""Bytes of new rollouts up to which this process writes the report itself: its libraries are loaded already, and it is
busy for well under a second. For more it starts another process, so that no stage has to wait."""
COMMAND = [sys.executable, "-P", "-m", "pipelines", "report"]
END_SECONDS = 600.0


def listen(run: RunDirectory, graph: Graph) -> Listen:
    """Listen to evaluations and to the end of a run."""
    return PageWriter(run, graph)


class PageWriter:
    """Writes the report, in this process or in one other at a time."""

    def __init__(self, run: RunDirectory, graph: Graph) -> None:
        self._run = run
        self._graph = graph
        self._last = max((node.iteration or 0 for node in graph.nodes.values()), default=0)
        self._changed = not (run.path / PAGE).exists()  # since the page was written
        # Whether a policy was evaluated since then. The last one does not count: the run ends right after it.
        self._evaluated = False
        self._unread = 0
        self._child: ReaderProcess | None = None

    def __call__(self, events: list[Event]) -> None:
        """Write the report if it is due; at the end of the run, wait until it is written."""
        ended = any(isinstance(event, RunEnded) for event in events)
        for event in events:
            self._note(event)
        if self._child is not None and (ended or not self._child.running):
            self._reap()
        if self._child is None and (self._evaluated or (ended and self._changed)):
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
            self._evaluated = self._evaluated or (node.stage.schema == EVALUATION and node.iteration != self._last)
            if node.stage.schema == ROLLOUTS:
                self._unread += sum(path.stat().st_size for path in node.output.glob("shard-*"))

    def _write(self) -> None:
        in_background, self._unread, self._changed, self._evaluated = self._unread > INLINE_BYTES, 0, False, False
        if in_background:
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
        """Wait for the process that writes: when a job of a cluster ends, its processes are killed."""
        self._reap()

    def _reap(self) -> None:
        child, self._child = self._child, None
        if child is not None and (failure := child.wait(time.monotonic() + END_SECONDS)):
            raise RuntimeError(f"`pipeline report` failed: {failure}")
