"""Decides whether a stage is reused or runs, with the reason in words."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fingerprint import RELEASED
from contracts.following import Producer, hidden_key, producer_key
from contracts.manifest import MANIFEST, Manifest
from contracts.publication import partial_directory
from contracts.stage import key_parts, stage_key
from pipelines.graph import Graph, Node

SUPERSEDED = "superseded"
ALTERNATIVES = "alternatives"
"""Folder of a run for pairs that it did not train on; see pipelines/run/alternatives.py."""


@dataclass(frozen=True)
class Decision:
    """Whether a stage is reused or runs, and why."""

    reuse: bool
    reason: str
    key: str
    """The stage key to publish under. For a stage that follows another it is not known yet, and `hidden_key` stands in
    for it."""
    hidden_key: str = ""
    """The key in the name of the hidden directory."""
    follows: dict[str, Producer] = field(default_factory=dict)
    """Producers of the unpublished inputs whose shards the stage reads while they are produced, by input path."""


def decide(
    node: Node,
    versions: dict[str, str],
    run: Path,
    where: Callable[[Path], Path] = lambda path: path,
    rebuild: str | None = None,
) -> Decision:
    """Decide about a stage of the run in the directory `run` whose inputs are all published.

    Args:
        where: maps an input's path to its present place; a dry run restores nothing from superseded/.
        rebuild: the reason to rebuild its deleted weights, if something needs them (`why_rebuilt`).

    Raises:
        UserError: an input does not exist.
    """
    parts = key_parts(node.config, versions, where)
    key = stage_key(parts)
    followed = node.stage.follows(node.config)
    hidden = hidden_key(parts, followed, None if followed is None else producer_key(where(node.path(followed))))
    published = (node.output / MANIFEST).is_file()
    if published and Artifact.open(node.output).manifest.key == key:
        if rebuild and (node.output / RELEASED).is_file():
            return Decision(False, rebuild, key, hidden)
        return Decision(True, "published under the same key", key, hidden)
    if node.output.exists() and not published:
        raise UserError(f"{node.output} exists but is not published. It was not created by Ratchet: move it away.")
    back = superseded_path(run, node, key)
    if back.exists() and not (rebuild and (back / RELEASED).is_file()):
        lender = lender_of(back)
        reason = f"reused from {lender}" if lender else f"restored from {SUPERSEDED}/"
        return Decision(True, reason, key, hidden)
    if partial_directory(node.output, hidden).exists():
        return Decision(False, "continues where it was interrupted", key, hidden)
    earlier = node.output if published else _latest_superseded(run, node)
    if earlier is None:
        return Decision(False, "not made yet", key, hidden)
    changed = differences(Artifact.open(earlier).manifest.key_parts, parts)
    return Decision(False, "; ".join(changed) or "run again", key, hidden)


def decide_to_follow(node: Node, versions: dict[str, str], maker: Node, making: Producer) -> Decision:
    """The decision to start a stage on the shards that `maker`, which produces one of its inputs, has finished."""
    followed = node.stage.follows(node.config)
    hidden = hidden_key(key_parts(node.config, versions, followed=followed), followed, making.key)
    return Decision(False, f"follows {maker.name}", hidden, hidden, {str(maker.output): making})


def may_reproduce_output(maker: Node, key: str, run: Path) -> bool:
    """Whether a running stage has published under its key before (`--force`), so that its readers may be reused."""
    return any((run / SUPERSEDED / maker.name).glob(f"{key[:16]}*"))


def why_rebuilt(reader: str) -> str:
    """The reason to rebuild a stage's deleted weights."""
    return f"its weights were deleted by gc and {reader} needs them"


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Describe how two sets of key parts differ: "beta 0.1 → 0.2", "input pairs changed"."""
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


def superseded_path(run: Path, node: Node, key: str) -> Path:
    """The directory in superseded/ for a stage's output under a key."""
    return run / SUPERSEDED / node.name / key[:16]


def lender_file(place: Path) -> Path:
    """The file that names the lending run, for an artifact in superseded/ that was shared by another run."""
    return place.with_name(f"{place.name}.run")


def lender_of(place: Path) -> str | None:
    """The run that an artifact in superseded/ was shared by; None if this run made it."""
    try:
        return lender_file(place).read_text()
    except FileNotFoundError:
        return None


def _latest_superseded(run: Path, node: Node) -> Path | None:
    """The newest output of a stage in superseded/."""
    versions = [path.parent for path in (run / SUPERSEDED / node.name).glob(f"*/{MANIFEST}")]
    return max(versions, key=lambda path: path.stat().st_ctime_ns, default=None)


def has_current_inputs(node: Node, graph: Graph, manifest: Manifest) -> bool:
    """Whether a published stage read exactly what its upstream stages have published now."""
    known = {digest for value in manifest.inputs.values() for digest in (value if isinstance(value, list) else [value])}
    outputs = {graph.nodes[name].output for name in node.needs}
    read = outputs.intersection(node.config.input_paths())  # without the toy task's single files
    return all((path / MANIFEST).is_file() and Artifact.open(path).manifest.digest in known for path in read)
