"""What the user sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from contracts.artifacts import Artifact
from pipelines.execution.executors import Running
from pipelines.execution.supervisor import progress_of
from pipelines.graph import Graph, Node


class Screen(Console):
    """Standard output. That nobody reads it any more is said like any other failure, and `main` answers it."""

    def on_broken_pipe(self) -> None:
        """Instead of an exit with another code than `main` gives."""
        raise BrokenPipeError


class Display:
    """Tells what happens to each stage, and how far the running ones are."""

    def __init__(self, console: Console, graph: Graph) -> None:
        self.console = console
        self.total = len(graph.nodes)
        self.done = 0
        self._started: dict[str, float] = {}
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def started(self, node: Node, reason: str) -> None:
        """A stage starts."""
        self._started[node.name] = time.monotonic()
        self._line(f"run    {node.name}  ({reason})")

    def reused(self, node: Node, reason: str) -> None:
        """A stage is reused."""
        self.done += 1
        self._line(f"reuse  {node.name}  ({reason})")

    def published(self, node: Node, artifact: Artifact) -> None:
        """A stage has published."""
        self.done += 1
        seconds = time.monotonic() - self._started[node.name]
        self._line(f"done   {node.name}  {seconds:.1f} s, {artifact.manifest.ledger}  [{self.done}/{self.total}]")

    def failed(self, node: Node) -> None:
        """A stage has failed."""
        self._line(f"FAILED {node.name}")

    def retried(self, node: Node, how: str, seconds: float) -> None:
        """A stage is going to be tried again."""
        self._line(f"retry  {node.name}  ({how.rstrip('.')}; once more in {seconds:.0f} s)")

    def ending(self, running: dict[str, Running], grace: float) -> None:
        """The stages that still run are asked to stop."""
        names = ", ".join(running)
        self._line(f"ending {names}  (up to {grace:g} s for what is in hand; interrupt again to end at once)")

    def note(self, line: str) -> None:
        """Something that is no stage's doing."""
        self._line(line)

    def refresh(self, running: dict[str, Running]) -> None:
        """Redraw the live table."""
        if self._live is None:
            return
        table = Table(box=None, pad_edge=False)
        for title in (f"{self.done} of {self.total} stages", "seconds", "progress"):
            table.add_column(title)
        for name, stage in running.items():
            seconds = time.monotonic() - self._started[name]
            table.add_row(name, f"{seconds:.0f}", progress_of(stage.attempt) or "starting")
        self._live.update(table, refresh=True)

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)
