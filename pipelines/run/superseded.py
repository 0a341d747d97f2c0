"""Keeps what a stage published under other keys in superseded/, and restores it when that key is wanted again.

    superseded/STAGE/KEY/            output of STAGE under KEY; also its output without weights, while these are rebuilt
    superseded/STAGE/KEY-forced-N/   output that --force moved aside
    superseded/STAGE/KEY.run         for an output offered by --share: the run that it belongs to

Directories are renamed to .trash-* before they are deleted, so that no process sees a partial directory.
"""

import os
import shutil
import tempfile
from pathlib import Path

from contracts.artifacts import Artifact
from contracts.fingerprint import RELEASED
from contracts.manifest import MANIFEST
from pipelines.graph import Node
from pipelines.run.decisions import Decision, lender_file, superseded_path

TRASH = ".trash-"


def move_outputs(node: Node, decision: Decision, run: Path) -> None:
    """Move a stage's old output aside before it runs, or restore the output that has the wanted key."""
    if (node.output / MANIFEST).is_file():
        old = Artifact.open(node.output).manifest.key
        if old == decision.key and decision.reuse:
            delete_replaced(node, old, run)
            return
        aside = superseded_path(run, node, old)
        aside.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():  # a released output, replaced by a command that was killed
            discard(aside, run)
        os.rename(node.output, aside)
    if decision.reuse:
        node.output.parent.mkdir(parents=True, exist_ok=True)
        place = superseded_path(run, node, decision.key)
        os.rename(place, node.output)
        lender_file(place).unlink(missing_ok=True)


def delete_replaced(node: Node, key: str, run: Path) -> bool:
    """Delete the old output of a released stage that has run again. Returns whether the new content is the same.

    A stage that follows another may also reproduce an output kept here: its key is known only when the other ends.
    """
    old = superseded_path(run, node, key)
    if not old.exists():
        return True
    released = (old / RELEASED).is_file()
    same = not released or Artifact.open(old).manifest.digest == Artifact.open(node.output).manifest.digest
    discard(old, run)
    return same


def delete_partials(node: Node) -> None:
    """Delete the partial outputs of attempts under other keys, after a stage has published."""
    for path in node.output.parent.glob(f".{node.output.name}.partial-*"):
        shutil.rmtree(path)


def discard(directory: Path, run: Path) -> None:
    """Delete a directory of a run atomically by renaming it first, along with the file that names its lender."""
    lender_file(directory).unlink(missing_ok=True)
    trash = Path(tempfile.mkdtemp(prefix=TRASH, dir=run))
    os.rename(directory, trash / "discarded")
    shutil.rmtree(trash)


def finish_deletions(run: Path) -> None:
    """Finish deletions that a kill interrupted."""
    for trash in run.glob(f"{TRASH}*"):
        shutil.rmtree(trash)
