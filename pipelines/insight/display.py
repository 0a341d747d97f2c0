"""Shows a run's progress while it is driven: as a live table on a terminal, as plain lines elsewhere."""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from pipelines.execution.endings import fraction_done, latest_metrics, progress_of
from pipelines.graph import Graph
from pipelines.insight.event_text import is_good_news, live_line, metrics_in_words
from pipelines.insight.remaining_time import RemainingTime, in_words
from pipelines.planning.cluster import cluster_of
from pipelines.planning.scheduling import streams
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, StageFailed, StagePublished, StageReused, StageStarted
from pipelines.text import fits_width, stacked_table

ESTIMATE_SECONDS = 1.0
"""Shortest time between two estimates of the remaining time: each looks at all stages."""


class Display:
    """A listener that prints the events of stages, and the progress of those that run."""

    def __init__(self, console: Console, run: RunDirectory, graph: Graph, *, quiet: bool = False):
        """Show the stages of a graph; with `quiet`, print only what goes wrong."""
        self.console = console
        self._run = run
        self._total = len(graph.nodes)
        self._quiet = quiet
        self._is_closed = False
        self._remaining = RemainingTime(graph, cluster_of(run.config), streams(graph, run.config))
        self._running: dict[str, StageStarted] = {}
        self._time_left, self._estimated_at = "", -ESTIMATE_SECONDS
        live = console.is_terminal and not quiet
        self._live = Live(console=console, auto_refresh=False, transient=True) if live else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._unless_closed():
            if self._live:
                self._live.stop()

    def __call__(self, events: list[Event]) -> None:
        """Print these events, and update the table."""
        if not self._is_closed:
            with self._unless_closed():
                self._print(events)

    @contextmanager
    def _unless_closed(self) -> Iterator[None]:
        """Print nothing more once the terminal has been closed."""
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self._is_closed = True

    def _print(self, events: list[Event]) -> None:
        self._remaining.update(events)
        for event in events:
            self._track(event)
            line = live_line(event)
            if line is not None and isinstance(event, StagePublished):
                words = in_words(self._remaining.seconds(self._shares())) if self._live is None else ""
                line += f"  [{len(self._remaining.done)}/{self._total}{words and f', {words}'}]"
            if line is not None and not (self._quiet and is_good_news(event)):
                self.console.print(line, soft_wrap=True, markup=False, highlight=False)
        if self._live:
            self._live.update(self._table(), refresh=True)

    def _track(self, event: Event) -> None:
        """Keep track of the running stages."""
        if isinstance(event, StageStarted):
            self._running[event.stage] = event
        elif isinstance(event, StagePublished | StageReused | StageFailed):
            self._running.pop(event.stage, None)

    def _shares(self) -> dict[str, float]:
        """Progress of the running stages, from 0 to 1."""
        return {name: fraction_done(self._attempt(started)) for name, started in self._running.items()}

    def _attempt(self, started: StageStarted) -> Path:
        return self._run.path / "logs" / started.stage / started.attempt

    def _table(self) -> Table | Group:
        if time.monotonic() - self._estimated_at > ESTIMATE_SECONDS:
            self._estimated_at = time.monotonic()
            self._time_left = in_words(self._remaining.seconds(self._shares()))
        done = f"{len(self._remaining.done)} of {self._total} stages"
        table = self._rows(done, self._time_left)
        if fits_width(self.console, table):
            return table
        return stacked_table(self.console, self._rows("", ""), ", ".join(filter(None, (done, self._time_left))))

    def _rows(self, *titles: str) -> Table:
        """The table of running stages; `titles` are those of the first and the last column."""
        table = Table(box=None, pad_edge=False)
        for title in (titles[0], "seconds", "progress", titles[1]):
            table.add_column(title)
        for name, started in self._running.items():
            progress = progress_of(self._attempt(started))
            metrics = metrics_in_words(latest_metrics(self._attempt(started)))
            table.add_row(name, f"{max(0.0, time.time() - started.time):.0f}", progress or "starting", metrics)
        return table
