"""For each stage: reuse what is published, or run, and why, in words."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.manifest import MANIFEST
from contracts.publication import partial_directory
from contracts.stage import key_parts, stage_key
from pipelines.graph import Node

SUPERSEDED = "superseded"


@dataclass(frozen=True)
class Decision:
    """What to do with a stage, and the reason to tell."""

    reuse: bool
    reason: str
    key: str


def decide(
    node: Node, versions: dict[str, str], run: Path, where: Callable[[Path], Path] = lambda path: path
) -> Decision:
    """Decide about a stage of the run in the directory `run` whose inputs are all published.

    `where`: the place at which an input lies now; for a dry run, which takes nothing back from superseded/.

    Raises:
        UserError: an input does not exist.
    """
    parts = key_parts(node.config, versions, where)
    key = stage_key(parts)
    published = (node.output / MANIFEST).is_file()
    if published and Artifact.open(node.output).manifest.key == key:
        return Decision(True, "published under the same key", key)
    if node.output.exists() and not published:
        raise UserError(f"{node.output} exists but is not published. It is not Ratchet's: move it away.")
    if kept(run, node, key).exists():
        return Decision(True, f"taken back from {SUPERSEDED}/", key)
    if partial_directory(node.output, key).exists():
        return Decision(False, "continues where it was interrupted", key)
    earlier = node.output if published else _last_kept(run, node)
    if earlier is None:
        return Decision(False, "not made yet", key)
    changed = differences(Artifact.open(earlier).manifest.key_parts, parts)
    return Decision(False, "; ".join(changed) or "made again", key)


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """How two sets of key parts differ, in words: "beta 0.1 → 0.2", "input pairs changed"."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted({*old, *new}):
            found += differences(old.get(name), new.get(name), f"{place}.{name}" if place else name)
        return found
    if old == new:
        return []
    area, _, rest = place.partition(".")
    if area in ("inputs", "sources"):
        return [f"{'input' if area == 'inputs' else 'source file of'} {rest} changed"]
    label = {"config": rest, "versions": f"version of {rest}", "code": "code version of the stage"}.get(area, place)
    return [f"{label} {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def make_room(node: Node, decision: Decision, run: Path) -> None:
    """Act on a decision: move what was published under another key aside, never delete it; take back what fits."""
    if (node.output / MANIFEST).is_file():
        old = Artifact.open(node.output).manifest.key
        if old == decision.key:
            return
        aside = kept(run, node, old)
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.rename(node.output, aside)
    back = kept(run, node, decision.key)
    if back.exists():
        node.output.parent.mkdir(parents=True, exist_ok=True)
        os.rename(back, node.output)


def kept(run: Path, node: Node, key: str) -> Path:
    """Where what a stage had published under a key is kept."""
    return run / SUPERSEDED / node.name / key[:16]


def _last_kept(run: Path, node: Node) -> Path | None:
    """What the stage had published last, of what is kept."""
    versions = [path.parent for path in (run / SUPERSEDED / node.name).glob(f"*/{MANIFEST}")]
    return max(versions, key=lambda path: path.stat().st_ctime_ns, default=None)


def drop_partials(node: Node) -> None:
    """After a stage is published: delete what interrupted attempts under other keys have left beside it."""
    for path in node.output.parent.glob(f".{node.output.name}.partial-*"):
        shutil.rmtree(path)
