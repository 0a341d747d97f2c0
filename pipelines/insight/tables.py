"""Prints the table of held-out metrics by iteration."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.graph import Graph
from pipelines.run.gates import refused, stop_decision
from pipelines.run.metrics import COLUMNS, best_of, evaluations, is_further_scorer, ranking_metric
from pipelines.text import format_ranges, relative_path


def print_table(console: Console, graph: Graph) -> None:
    """Print the table, the path of the best checkpoint, and why a gate has stopped the run."""
    rows = evaluations(graph)
    if not rows:
        return
    first = rows[0][1]
    columns = {name: title for name, title in COLUMNS.items() if first.get(name) is not None or name == "win_rate"}
    columns |= {name: name.removesuffix("_mean").replace("_", " ") for name in first if is_further_scorer(name)}
    table = Table(title="Held-out prompts, by iteration (0: the initial policy)")
    for title in ["iteration", *columns.values()]:
        table.add_column(title, justify="right")
    for _, metrics in rows:
        table.add_row(str(metrics["iteration"]), *(_number(metrics.get(name)) for name in columns))
    console.print(table)
    refused_iterations = refused(graph)
    policy, best = best_of(rows, refused_iterations)
    unknown = {metrics["kl_reason"] for _, metrics in rows if metrics.get("kl_reason")}
    for reason in sorted(unknown):
        console.print(f"KL is not estimated: {reason}", soft_wrap=True, highlight=False)
    without = f"; refused by a gate: {format_ranges(refused_iterations)}" if refused_iterations else ""
    console.print(
        f"Best checkpoint (by {ranking_metric(first)}, iteration {best['iteration']}{without}): "
        f"{relative_path(policy)}",
        soft_wrap=True,
        highlight=False,
    )
    if (stop := stop_decision(graph)) is not None:
        console.print(f"Stopped: {stop.reason}", soft_wrap=True, highlight=False)


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.3f}"
