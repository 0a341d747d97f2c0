"""`pipeline runs`: lists all runs below a directory, with their state and their latest metric."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from contracts.errors import UserError
from contracts.points import read_points
from pipelines.run.directory import RunDirectory
from pipelines.run.events import RunEnded, RunStarted, StageInvalidated, StagePublished, StageReused
from pipelines.run.metrics import ranking_metric
from pipelines.run.points import EVAL, is_evaluation, latest
from pipelines.text import echo, relative_path

DEPTH = 3
"""Levels of directories to search."""


def runs_below(directory: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The directories of all runs below a directory, sorted by name."""
    if (directory / "run.json").is_file():
        yield directory
    elif depth and directory.is_dir():
        for path in sorted(directory.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from runs_below(path, depth - 1)


def summary(path: Path) -> dict[str, Any]:
    """One run as a row of the table, from its events and metrics alone: its config and artifacts are not read."""
    run = RunDirectory(path)
    total, outcome, done, last = 0, "", set(), 0.0
    for event in run.events():
        last = max(last, event.time)
        match event:
            case RunStarted():
                total, outcome = event.stages, ""
            case RunEnded():
                outcome = event.outcome
            case StagePublished(stage=stage) | StageReused(stage=stage):
                done.add(stage)
            case StageInvalidated(stage=stage):
                done.discard(stage)
    try:
        holder = run.holder()
    except OSError:
        holder = None
    state = "running" if holder else outcome or ("interrupted" if last else "new")
    found = [point for points in latest(read_points(path)).values() for point in points[-1:] if is_evaluation(point)]
    evaluated = max(found, key=lambda point: point.iteration, default=None)
    metrics = {} if evaluated is None else {name.removeprefix(EVAL): value for name, value in evaluated.metrics.items()}
    name = ranking_metric(metrics)
    value = metrics.get(name)
    return {
        "run": str(path),
        "state": state,
        "stages": f"{min(len(done), total) if total else len(done)}/{total}" if total else "",
        "iteration": None if evaluated is None else evaluated.iteration,
        "metric": None if value is None else f"{EVAL}{name}",
        "value": value,
        "last": last or None,
    }


def summaries(directory: Path) -> Iterator[dict[str, Any]]:
    """The summary of each run below a directory; for a run that cannot be read, with the reason."""
    for path in runs_below(directory):
        try:
            yield summary(path)
        except (OSError, UserError, ValueError) as error:
            nothing = dict.fromkeys(("stages", "iteration", "metric", "value", "last"))
            yield {"run": str(path), "state": "damaged", **nothing, "error": str(error)}


def print_runs(console: Console, directory: Path) -> None:
    """Print a table of the runs below a directory.

    Raises:
        UserError: there is none.
    """
    rows = list(summaries(directory))
    if not rows:
        raise UserError(f"there is no run below {directory}. Name a directory that holds some: pipeline runs DIRECTORY")
    table = Table("run", "state", "stages", "iteration", "latest metric", "last event")
    for row in rows:
        metric = "" if row["metric"] is None else f"{row['metric'].removeprefix(EVAL)} {row['value']:.3f}"
        when = "" if row["last"] is None else time.strftime("%F %H:%M", time.localtime(row["last"]))
        iteration = "" if row["iteration"] is None else str(row["iteration"])
        table.add_row(
            str(relative_path(Path(row["run"]).absolute())), row["state"], row["stages"] or "", iteration, metric, when
        )
    console.print(table)
    echo(console, "`pipeline status RUN` shows one in detail; `pipeline compare RUN RUN` compares them.")
