"""For each stage: reuse what is published, or run, and why, in words."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.artifacts import MANIFEST, Artifact, partial_directory
from contracts.errors import UserError
from contracts.stage import key_parts, stage_key
from pipelines.graph import Node

SUPERSEDED = "superseded"


@dataclass(frozen=True)
class Decision:
    """What to do with a stage, and the reason to tell."""

    reuse: bool
    reason: str
    key: str


def decide(node: Node, versions: dict[str, str]) -> Decision:
    """Decide about a stage whose inputs are all published.

    Raises:
        UserError: an input does not exist.
    """
    parts = key_parts(node.config, versions)
    key = stage_key(parts)
    if not (node.output / MANIFEST).is_file():
        if node.output.exists():
            raise UserError(f"{node.output} exists but is not published. It is not Ratchet's: move it away.")
        if partial_directory(node.output, key).exists():
            return Decision(False, "continues where it was interrupted", key)
        return Decision(False, "not made yet", key)
    manifest = Artifact.open(node.output).manifest
    if manifest.key == key:
        return Decision(True, "published under the same key", key)
    return Decision(False, "; ".join(differences(manifest.key_parts, parts)), key)


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


def make_room(node: Node, decision: Decision, run: Path) -> Decision:
    """Before a stage runs: move what was published under another key aside, never delete it.

    Returns the decision, which becomes *reuse* where an artifact that was set aside under the wanted key is back.
    """
    if (node.output / MANIFEST).is_file():
        old = Artifact.open(node.output).manifest.key
        aside = run / SUPERSEDED / node.name / old[:16]
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.rename(node.output, aside)
    kept = run / SUPERSEDED / node.name / decision.key[:16]
    if not kept.exists():
        return decision
    node.output.parent.mkdir(parents=True, exist_ok=True)
    os.rename(kept, node.output)
    return Decision(True, f"taken back from {SUPERSEDED}/", decision.key)


def drop_partials(node: Node) -> None:
    """After a stage is published: delete what interrupted attempts under other keys have left beside it."""
    for path in node.output.parent.glob(f".{node.output.name}.partial-*"):
        shutil.rmtree(path)
