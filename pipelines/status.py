"""`pipeline status RUN`: how far a run is, from what is on the disk."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from contracts.artifacts import MANIFEST, Artifact
from pipelines.graph import Graph, Node
from pipelines.report import print_table
from pipelines.rundir import RunDirectory
from pipelines.supervisor import failure_of


def print_status(console: Console, run: RunDirectory, graph: Graph) -> None:
    """Every stage with its state, then the metrics so far."""
    holder = run.holder()
    console.print(f"{run.path}: {'driven by ' + holder if holder else 'nobody drives it'}", soft_wrap=True)
    table = Table("stage", "state", "rows", "seconds", "detail")
    for node in graph.nodes.values():
        table.add_row(node.name, *state_of(run, node, driven=holder is not None))
    console.print(table)
    print_table(console, graph)


def state_of(run: RunDirectory, node: Node, *, driven: bool) -> tuple[str, str, str, str]:
    """State, rows, seconds and detail of a stage."""
    if (node.output / MANIFEST).is_file():
        manifest = Artifact.open(node.output).manifest
        return "published", str(manifest.rows), f"{manifest.seconds.get('total', 0):.1f}", str(manifest.ledger)
    attempts = run.attempts(node.name)
    if not attempts:
        return "waiting", "", "", ""
    last = attempts[-1]
    failure = failure_of(last)
    if failure is not None:
        return "failed", "", "", f"{failure['text'].strip().splitlines()[-1]} (log: {last / 'stage.log'})"
    if (last / "exit.json").exists() or not driven:
        return "interrupted", "", "", _progress(last)
    return "running", "", "", _progress(last)


def _progress(attempt: Path) -> str:
    path = attempt / "progress.json"
    if not path.exists():
        return ""
    record = json.loads(path.read_bytes())
    return f"{record['done']}/{record['total']} {record['unit']}"
