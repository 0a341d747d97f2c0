"""`pipeline gc RUN`: deletes and compresses what is no longer needed, and prints why the rest is kept."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fingerprint import RELEASED
from contracts.jsonl import COMPRESSED
from contracts.manifest import MANIFEST
from pipelines.config.sections import RetentionSection
from pipelines.graph import Graph, folder_of
from pipelines.iteration import build_graph
from pipelines.run.decisions import SUPERSEDED, has_current_inputs
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Collected
from pipelines.run.retention import CollectionStep, compress, own_bytes, release, steps
from pipelines.run.superseded import TRASH, discard
from pipelines.text import echo, format_megabytes, plural

SCRATCH = re.compile(rf"({re.escape(RELEASED)}|.*{re.escape(COMPRESSED)})\.[^/]+\.tmp")


def collect(
    console: Console,
    run: RunDirectory,
    section: RetentionSection,
    busy: Callable[[], int],
    *,
    superseded: bool,
    dry_run: bool,
) -> None:
    """Carry out `plan` and print it.

    Args:
        busy: counts the run's unfinished jobs on other machines; called if no driver holds the lock.

    Raises:
        UserError: the run is active, or something it depends on cannot be read.
    """
    run.lock()
    if jobs := busy():
        raise UserError(
            f"{plural(jobs, 'job')} of {run.path} have not ended, and need what would be deleted. Wait for them "
            f"(`pipeline attach {run.path}`), or end them with `pipeline cancel {run.path}`."
        )
    if run.pinned:
        echo(console, f"{run.path} is pinned: nothing of it is deleted or compressed. `pipeline pin --off` ends that.")
        return
    freed = packed = 0
    for step in plan(run, section, superseded=superseded):
        size = step.bytes
        name = step.path.relative_to(run.path).as_posix()
        if step.verb != "keep" and not dry_run:
            size = perform(step, run)
            run.record(Collected(verb=step.verb, path=name, bytes=size, reason=step.reason))
        if step.verb == "compress" and dry_run:
            packed += size
        elif step.verb != "keep":
            freed += size
        echo(console, f"{step.verb:<8} {name}  {format_megabytes(size)}  ({step.reason})")
    if dry_run:
        more = f", plus what compressing {format_megabytes(packed)} saves" if packed else ""
        echo(console, f"{format_megabytes(freed)} would be freed{more}. Nothing was changed.")
    else:
        echo(console, f"{format_megabytes(freed)} were freed.")


def plan(run: RunDirectory, section: RetentionSection, *, superseded: bool) -> list[CollectionStep]:
    """All steps for a run; changes nothing.

    Raises:
        UserError: a manifest, or the inputs of another run, cannot be read.
    """
    graph = whole_graph(run)
    found = [CollectionStep("delete", path, reason, own_bytes(_files_in(path))) for path, reason in leftovers(run.path)]
    old = sorted(manifest.parent for manifest in (run.path / SUPERSEDED).rglob(MANIFEST))
    if superseded:
        reason = "published under another key"
        found += [CollectionStep("delete", path, reason, own_bytes(_files_in(path))) for path in old]
    elif old:
        size = own_bytes(_files_in(run.path / SUPERSEDED))
        reason = f"{len(old)} artifacts; --superseded deletes them"
        found.append(CollectionStep("keep", run.path / SUPERSEDED, reason, size))
    return [*found, *steps(run, graph, up_to_date(graph), section, run.config.hub_repos)]


def perform(step: CollectionStep, run: RunDirectory) -> int:
    """Carry out one step. Returns the bytes freed."""
    if step.verb == "release":
        return release(Artifact.open(step.path), step.reason)
    if step.verb == "compress":
        return compress(Artifact.open(step.path))
    if step.path.is_file():
        step.path.unlink()
    elif step.path.name.startswith(TRASH):
        shutil.rmtree(step.path)
    else:
        discard(step.path, run.path)
    return step.bytes


def whole_graph(run: RunDirectory) -> Graph:
    """The graph of a run with all iterations that it is configured for or has directories of."""
    count = run.iterations
    while (run.path / folder_of(count + 1)).is_dir():
        count += 1
    return build_graph(run.config, count)


def up_to_date(graph: Graph) -> set[str]:
    """The published stages that read exactly what their upstream stages have published now."""
    found: set[str] = set()
    for node in graph.nodes.values():
        if not found.issuperset(node.needs) or not (node.output / MANIFEST).is_file():
            continue
        if has_current_inputs(node, graph, Artifact.open(node.output).manifest):
            found.add(node.name)
    return found


def leftovers(run: Path) -> Iterator[tuple[Path, str]]:
    """Files and directories that nothing will read or resume, each with the reason."""
    for path in sorted(run.glob(f"{TRASH}*")):
        yield path, "left by a command that was killed"
    for path in sorted(run.rglob("*.tmp")):
        if SCRATCH.fullmatch(path.name) and (path.parent / MANIFEST).is_file():
            yield path, "left by a command that was killed"
    for path in sorted(run.rglob(".*.partial-*")):
        name, _, key = path.name[1:].rpartition(".partial-")
        target = path.with_name(name)
        # A released stage that runs again has the same key.
        rebuilding = (target / RELEASED).is_file() and Artifact.open(target).manifest.key[:16] == key
        if (target / MANIFEST).is_file() and not rebuilding:
            yield path, "begun under another key than the published output"


def _files_in(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
