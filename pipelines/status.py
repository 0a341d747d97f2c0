"""`pipeline status RUN`: how far a run is, from what is on the disk."""

from rich.console import Console
from rich.table import Table

from contracts.artifacts import MANIFEST, RELEASED, Artifact, Manifest
from contracts.errors import UserError
from pipelines.graph import Graph, Node, input_paths
from pipelines.report import print_table
from pipelines.rundir import RunDirectory
from pipelines.supervisor import failure_of, progress_of


def print_status(console: Console, run: RunDirectory, graph: Graph) -> None:
    """Every stage with its state, then the metrics so far."""
    holder = run.holder()
    pinned = ", pinned" if run.pinned else ""
    console.print(f"{run.path}: {'driven by ' + holder if holder else 'nobody drives it'}{pinned}", soft_wrap=True)
    table = Table("stage", "state", "rows", "seconds", "detail")
    for node in graph.nodes.values():
        table.add_row(node.name, *state_of(run, node, graph, driven=holder is not None))
    console.print(table)
    print_table(console, graph)


def state_of(run: RunDirectory, node: Node, graph: Graph, *, driven: bool) -> tuple[str, str, str, str]:
    """State, rows, seconds and detail of a stage."""
    if (node.output / MANIFEST).is_file():
        try:
            manifest = Artifact.open(node.output).manifest
            current = reads_what_is_there(node, graph, manifest)
        except UserError as error:
            return "damaged", "", "", str(error)
        state = "outdated"
        if current:
            state = "released" if (node.output / RELEASED).is_file() else "published"
        return state, str(manifest.rows), f"{manifest.seconds.get('total', 0):.1f}", str(manifest.ledger)
    attempts = run.attempts(node.name)
    if not attempts:
        return "waiting", "", "", ""
    last = attempts[-1]
    failure = failure_of(last)
    if failure is not None and failure["kind"] != "stopped":
        state = "retrying" if driven and failure["kind"] == "transient" else "failed"
        return state, "", "", f"{failure['text'].strip().splitlines()[-1]} (log: {last / 'stage.log'})"
    if (last / "exit.json").exists() or not driven:
        return "interrupted", "", "", progress_of(last) or ""
    return "running", "", "", progress_of(last) or ""


def reads_what_is_there(node: Node, graph: Graph, manifest: Manifest) -> bool:
    """Whether a published stage was made from what the stages before it have published now."""
    known = {digest for value in manifest.inputs.values() for digest in (value if isinstance(value, list) else [value])}
    outputs = {graph.nodes[name].output for name in node.needs}
    read = outputs.intersection(input_paths(node.config))  # not the single files of the embedded world
    return all((path / MANIFEST).is_file() and Artifact.open(path).manifest.digest in known for path in read)
