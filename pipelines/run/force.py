"""`pipeline run --force STAGE`: runs published stages again. Their old output moves to superseded/.

A command that is killed and repeated does not force a stage twice: until a command has finished, forced.json records
what was moved already.
"""

import fnmatch
import os
from pathlib import Path

import msgspec

from contracts.artifacts import Artifact
from contracts.errors import UserError, did_you_mean
from contracts.files import write_atomically
from contracts.manifest import MANIFEST
from pipelines.graph import Graph
from pipelines.run.decisions import SUPERSEDED

RECORD = "forced.json"


class Forced(msgspec.Struct, frozen=True):
    """Identifies the output of a forced stage before it was moved."""

    digest: str
    inode: int
    """Inode of its manifest. The moved output still exists, so that no later manifest has the same inode."""


def resolve(graph: Graph, wanted: list[str]) -> list[str]:
    """Expand names of stages, directories of several stages, and patterns with * into stage names.

    Raises:
        UserError: one of them matches no stage of the run.
    """
    found: dict[str, None] = {}
    for text in wanted:
        name = text.rstrip("/")
        matches = [stage for stage in graph.nodes if stage.startswith(f"{name}/") or fnmatch.fnmatchcase(stage, name)]
        if not matches:
            hint = did_you_mean(name, graph.nodes, 3)
            raise UserError(f"--force {text}: the run has no such stage.{hint} `pipeline status` lists them.")
        found |= dict.fromkeys(matches)
    return list(found)


def set_aside(run: Path, graph: Graph, stages: list[str]) -> None:
    """Move the stages' published output to superseded/, each only once until `report_forced` is called."""
    record = _read(run)
    for name in stages:
        output = graph.nodes[name].output
        if not (output / MANIFEST).is_file():
            continue
        manifest = Artifact.open(output).manifest
        if record.setdefault(name, _identity(output)) != _identity(output):
            continue  # this command ran it again before it was interrupted
        write_atomically(run / RECORD, msgspec.json.encode(record))
        folder = run / SUPERSEDED / name
        folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in folder.glob(f"{manifest.key[:16]}-forced-*"))
        os.rename(output, folder / f"{manifest.key[:16]}-forced-{number + 1}")


def report_forced(run: Path, graph: Graph) -> list[str]:
    """Delete the record of forced stages. Returns a line for each that tells whether its new output is identical."""
    lines = []
    for name, old in _read(run).items():
        if name not in graph.nodes or not (graph.nodes[name].output / MANIFEST).is_file():
            continue
        new = Artifact.open(graph.nodes[name].output).manifest.digest
        same = "the same content" if new == old.digest else f"other content: {old.digest[:12]} → {new[:12]}"
        lines.append(f"forced {name}: {same}")
    (run / RECORD).unlink(missing_ok=True)
    return lines


def _identity(output: Path) -> Forced:
    return Forced(Artifact.open(output).manifest.digest, (output / MANIFEST).stat().st_ino)


def _read(run: Path) -> dict[str, Forced]:
    path = run / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Forced]) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Delete it.") from error
