"""`pipeline fork RUN --from-iteration I`: creates a run that shares earlier iterations with another by hard links."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from contracts import yaml_text
from contracts.artifacts import Artifact
from contracts.config import apply_overrides
from contracts.errors import UserError
from contracts.files import process_name, write_atomically
from contracts.manifest import MANIFEST
from pipelines.config.changes import CHANGEABLE, merge, require_changeable
from pipelines.config.load import load_run_config
from pipelines.config.run import RunConfig
from pipelines.graph import Graph
from pipelines.iteration import build_graph
from pipelines.run.decisions import SUPERSEDED
from pipelines.run.directory import COMMITS, RunDirectory, recorded_commits
from pipelines.run.sharing import link
from pipelines.text import plural

CONFIG = "config.yaml"
WHOLE_RUN_KEYS = frozenset({"environments", "executor", "hooks", "hub", "iterations", "retention", "tracking"})
"""Keys that a fork may set for the whole run, because they change no result."""


def fork(source: RunDirectory, first: int, overrides: list[str], name: str | None) -> tuple[Path, int]:
    """Create the new run next to the old one. Returns its directory and the number of shared artifacts.

    Iterations before `first` are linked as they are. If `overrides` change values, later artifacts are linked to
    superseded/, where a stage with the same key reuses them; without overrides, all later stages run again.

    Raises:
        UserError: `first` is out of range, a key cannot change in a fork, or the name exists already.
    """
    last = source.iterations
    if not 1 <= first <= last + 1:
        has = f"{source.path.name} has {plural(last, 'iteration')}"
        raise UserError(f"--from-iteration is {first}; {has}: give 1 to {last + 1}.")
    if name is not None and (not name or Path(name).name != name):
        raise UserError(f"--name is {name!r}; give a plain name: the fork is created next to {source.path}.")
    target = source.path.parent / (name or _free_name(source.path, first))
    if os.path.lexists(target):
        raise UserError(f"{target} exists already. Choose another --name.")
    settings = _settings(source.config, last, first, overrides, target)
    work = target.parent / f".{target.name}.fork-{process_name()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        write_atomically(work / CONFIG, yaml_text.dump(settings).encode())
        config = load_run_config(work / CONFIG, [])  # reports all mistakes in the values before anything is linked
        count = _link_artifacts(source, build_graph(source.config, last), work, first, bool(overrides))
        record: dict[str, Any] = {"config": CONFIG, "source": str((target / CONFIG).absolute())}
        record |= {"iterations": config.iterations, "settings": config.settings()}
        record |= {COMMITS: commits} if (commits := recorded_commits(source.config)) is not None else {}
        write_atomically(work / "run.json", json.dumps(record).encode())
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target, count


def _free_name(source: Path, first: int) -> str:
    taken = {path.name for path in source.parent.iterdir()}
    name = f"{source.name}-from-{first}"
    number = 1
    while (found := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return found


def _settings(config: RunConfig, iterations: int, first: int, overrides: list[str], target: Path) -> dict[str, Any]:
    """The new run's settings: those of the old one, with the new values from iteration `first` on."""
    change = apply_overrides({}, overrides)
    whole = {key: change.pop(key) for key in list(change) if key in WHOLE_RUN_KEYS}
    if unknown := set(change) - CHANGEABLE:
        known = ", ".join(sorted(CHANGEABLE | WHOLE_RUN_KEYS))
        raise UserError(f"{min(unknown)!r} cannot change in a fork. Keys that can: {known}. Otherwise start a new run.")
    require_changeable(change, first)
    settings = {**config.settings(), "iterations": iterations}
    settings.pop("hub", None)  # its repos belong to the old run
    settings = merge(settings, whole)
    changes = {start: _without(later, change) if start >= first else later for start, later in config.changes.items()}
    if change:
        changes[first] = merge(changes.get(first, {}), change)
    settings["changes"] = {start: later for start, later in sorted(changes.items()) if later}
    return {**settings, "name": target.name, "directory": str(target.parent)}


def _without(data: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`data` without the values that `change` sets."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if key not in change:
            kept[key] = value
        elif isinstance(value, dict) and isinstance(change[key], dict) and (rest := _without(value, change[key])):
            kept[key] = rest
    return kept


def _link_artifacts(source: RunDirectory, graph: Graph, work: Path, first: int, include_later: bool) -> int:
    """Link the old run's artifacts: earlier iterations in place, later ones to superseded/. Returns how many."""
    count = 0
    for name, node in graph.nodes.items():
        if not (node.output / MANIFEST).is_file():
            continue
        if node.iteration is None or node.iteration < first:
            link(node.output, work / name)
        elif include_later:
            link(node.output, work / SUPERSEDED / name / Artifact.open(node.output).manifest.key[:16])
        else:
            continue
        count += 1
    return count
