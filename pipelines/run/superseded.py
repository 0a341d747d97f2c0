"""superseded/ keeps what a stage published under other keys, and gives it back when that key is wanted again.

    superseded/STAGE/KEY/            what STAGE had published under KEY; also what it had published without weights,
                                     while these are made again
    superseded/STAGE/KEY-forced-N/   what was made anew by --force
    superseded/STAGE/KEY.run         where KEY/ was laid there by --share: whose it is

Deletions go by way of .trash-*, so that nobody ever sees half of a directory.
"""

import os
import shutil
import tempfile
from pathlib import Path

from contracts.artifacts import Artifact
from contracts.fingerprint import RELEASED
from contracts.manifest import MANIFEST
from pipelines.graph import Node
from pipelines.run.decisions import Decision, kept, lender_file

TRASH = ".trash-"


def act_on(node: Node, decision: Decision, run: Path) -> None:
    """Move a stage's old output aside before it runs, or move back the output that has the wanted key."""
    if (node.output / MANIFEST).is_file():
        old = Artifact.open(node.output).manifest.key
        if old == decision.key and decision.reuse:
            drop_replaced(node, old, run)
            return
        aside = kept(run, node, old)
        aside.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists():  # of a released stage that was made again by a command that was killed
            discard(aside, run)
        os.rename(node.output, aside)
    if decision.reuse:
        node.output.parent.mkdir(parents=True, exist_ok=True)
        place = kept(run, node, decision.key)
        os.rename(place, node.output)
        lender_file(place).unlink(missing_ok=True)


def drop_replaced(node: Node, key: str, run: Path) -> bool:
    """After a released stage has run once more, delete its old output; returns whether the content is the same.

    A stage that follows another may also make what is kept here: before the other's end nobody can tell.
    """
    old = kept(run, node, key)
    if not old.exists():
        return True
    released = (old / RELEASED).is_file()
    same = not released or Artifact.open(old).manifest.digest == Artifact.open(node.output).manifest.digest
    discard(old, run)
    return same


def drop_partials(node: Node) -> None:
    """After a stage has published: delete the partial outputs of attempts under other keys."""
    for path in node.output.parent.glob(f".{node.output.name}.partial-*"):
        shutil.rmtree(path)


def discard(directory: Path, run: Path) -> None:
    """Delete a directory of a run atomically, by renaming it first; and the note whose it is, of what was shared."""
    lender_file(directory).unlink(missing_ok=True)
    trash = Path(tempfile.mkdtemp(prefix=TRASH, dir=run))
    os.rename(directory, trash / "discarded")
    shutil.rmtree(trash)


def end_deletions(run: Path) -> None:
    """After a kill: finish interrupted deletions."""
    for trash in run.glob(f"{TRASH}*"):
        shutil.rmtree(trash)
