"""What the user sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines.execution.endings import progress_of
from pipelines.insight.wording import live_line
from pipelines.run.directory import RunDirectory
from pipelines.run.events import (
    Event,
    StageEvent,
    StageFailed,
    StageInvalidated,
    StagePublished,
    StageReused,
    StageStarted,
)


class Screen(Console):
    """Standard output. That nobody reads it any more is said like any other failure, and `main` answers it."""

    def on_broken_pipe(self) -> None:
        """Instead of an exit with another code than `main` gives."""
        raise BrokenPipeError


class Display:
    """Tells what happens to each stage, and how far the running ones are: a reader of the run's events."""

    def __init__(self, console: Console, run: RunDirectory, total: int) -> None:
        self.console = console
        self._run = run
        self._total = total
        self._done: set[str] = set()
        self._running: dict[str, StageStarted] = {}
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, events: list[Event]) -> None:
        """Tell these events, and renew the table."""
        for event in events:
            self._note(event)
            line = live_line(event)
            if line is not None and isinstance(event, StagePublished):
                line += f"  [{len(self._done)}/{self._total}]"
            if line is not None:
                self.console.print(line, soft_wrap=True, markup=False, highlight=False)
        if self._live:
            self._live.update(self._table(), refresh=True)

    def _note(self, event: Event) -> None:
        """Keep account of what is done and what runs."""
        if not isinstance(event, StageEvent):
            return
        if isinstance(event, StageStarted):
            self._running[event.stage] = event
        elif isinstance(event, StagePublished | StageReused | StageFailed):
            self._running.pop(event.stage, None)
        if isinstance(event, StagePublished | StageReused):
            self._done.add(event.stage)
        elif isinstance(event, StageInvalidated):
            self._done.discard(event.stage)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for title in (f"{len(self._done)} of {self._total} stages", "seconds", "progress"):
            table.add_column(title)
        for name, started in self._running.items():
            progress = progress_of(self._run.path / "logs" / name / started.attempt)
            table.add_row(name, f"{max(0.0, time.time() - started.time):.0f}", progress or "starting")
        return table
