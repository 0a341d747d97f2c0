"""`pipeline compare`: prints a comparison of runs."""

import msgspec
from rich.console import Console
from rich.table import Table

from contracts.errors import UserError
from pipelines.insight.compare.data import Comparison
from pipelines.run.metrics import ranking_metric
from pipelines.text import echo


def print_comparison(console: Console, found: Comparison, metric: str | None) -> None:
    """Print the differing settings, one metric by iteration, and the paired comparisons.

    Raises:
        UserError: no run has the metric.
    """
    metric = metric or ranking_metric(found.metrics)
    if metric not in found.metrics:
        known = ", ".join(sorted(found.metrics))
        raise UserError(f"there is no metric {metric!r} in {' or '.join(found.runs)}. Known: {known}.")
    if found.changes:
        table = Table(title="What differs in the configurations")
        for title in ("key", *found.runs):
            table.add_column(title, overflow="fold")
        for change in found.changes:
            table.add_row(change.key, *change.values)
        console.print(table)
    table = Table(title=f"{metric}, by iteration")
    table.add_column("run")
    iterations = sorted({iteration for series in found.metrics[metric] for iteration, _ in series.values})
    for iteration in iterations:
        table.add_column(str(iteration), justify="right")
    for series in found.metrics[metric]:
        values = dict(series.values)
        table.add_row(series.run, *(f"{values[i]:.3f}" if i in values else "-" for i in iterations))
    console.print(table)
    for paired in found.paired:
        echo(console, f"{paired.sentence}; it scores higher on {paired.wins:.0%} of them.")
    for note in dict.fromkeys(found.notes):
        echo(console, note)


def as_json(found: Comparison) -> str:
    """A comparison as one JSON object, with the sentence of each paired comparison."""
    data = msgspec.to_builtins(found)
    for row, paired in zip(data["paired"], found.paired, strict=True):
        row["sentence"] = paired.sentence
    return msgspec.json.format(msgspec.json.encode(data), indent=1).decode()
