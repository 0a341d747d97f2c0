"""Collects the ancestors of an artifact by the links in manifests."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts.artifacts import Artifact
from contracts.callables import source_files
from contracts.declaration import all_stages
from contracts.errors import UserError
from contracts.fingerprint import file_sha256
from pipelines.lineage.links import Index, Link, links_of, run_of
from training.registry import describe


def ancestry(home: Index, target: Artifact) -> dict[str, Any]:
    """An artifact and its ancestors: `artifacts` by name, each with its inputs, the target first.

    Each input tells whether it is still what was read.
    """

    def name_of(index: Index, artifact: Artifact) -> str:
        return index.name_of(artifact) if index is home else str(artifact.path)

    artifacts: dict[str, dict[str, Any]] = {}
    todo = [(home, target)]
    while todo:
        index, artifact = todo.pop()
        if (name := name_of(index, artifact)) in artifacts:
            continue
        inputs = [_input(index, link) for link in links_of(artifact.manifest)]
        named = [entry | {"artifact": name_of(*origin) if origin else None} for entry, origin in inputs]
        artifacts[name] = description(artifact) | {"inputs": named}
        todo += [origin for _, origin in reversed(inputs) if origin]
    return {"run": str(home.path), "target": name_of(home, target), "artifacts": artifacts}


def _input(index: Index, link: Link) -> tuple[dict[str, Any], tuple[Index, Artifact] | None]:
    """An input as plain data, and the artifact that it belongs to, if any."""
    found = index.find(link)
    entry: dict[str, Any] = {"name": link.name, "digest": link.digest, "path": link.path, "place": str(found.place)}
    entry |= {name: getattr(found, name) for name in ("state", "part", "now", "again", "error")}
    entry["former"] = "/".join(part for part in index.inner(link.path) or (link.path,) if part)
    if found.artifact is None or found.state not in ("same", "replaced"):
        return entry, None
    return entry, (index if found.inside else index_around(found.artifact.path), found.artifact)


def description(artifact: Artifact) -> dict[str, Any]:
    """The provenance of an artifact as plain data, from its manifest."""
    manifest = artifact.manifest
    parts = manifest.key_parts
    config = dict(parts.get("config", {}))
    return {
        "path": str(artifact.path),
        "stage": manifest.stage,
        "schema": f"{manifest.schema.name} v{manifest.schema.version}",
        "key": manifest.key,
        "digest": manifest.digest,
        "weights": manifest.weights,
        "created": manifest.created,
        "rows": manifest.rows,
        "ledger": str(manifest.ledger),
        "released": sorted(artifact.released),
        "config": config,
        "settings": dict(_settings(manifest.stage, config)),
        "code": parts.get("code"),
        "sources": _sources(config, parts.get("sources", {})),
        "versions": manifest.versions,
        "hardware": manifest.hardware,
        "facts": manifest.facts,
    }


def _settings(stage: str, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The seed and all values that differ from the stage's defaults; all values of an unknown stage."""
    declared = all_stages().get(stage)
    fields = declared.config.model_fields if declared else {}
    for name, value in config.items():
        if name == "settings":  # an algorithm's settings
            yield from _unlike_default(config.get("algorithm", ""), value)
            continue
        field = fields.get(name)
        default = None if field is None else field.get_default(call_default_factory=True)
        if name == "seed" or field is None or field.is_required() or default != value:
            yield name, value


def _unlike_default(algorithm: str, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings that differ from the algorithm's defaults; all settings of an unknown algorithm."""
    defaults: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        defaults = describe(algorithm).defaults
    yield from (item for item in settings.items() if item not in defaults.items())


def _sources(config: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """The user's own source files, with whether each has changed since."""
    files: dict[str, Path] = {}
    function = config.get("function") or config.get("strategy")  # of a scorer or an evaluation; of pairs
    with contextlib.suppress(UserError):
        if digests and function:
            files = source_files(function)
        elif digests and config.get("algorithm"):
            files = describe(config["algorithm"]).sources
    found = {}
    for name, digest in digests.items():
        state = "gone"
        if name in files:
            state = "same" if file_sha256(files[name]) == digest else "changed"
        found[name] = {"function": function if name == "function" else name, "digest": digest, "state": state}
    return found


def index_around(path: Path) -> Index:
    """The index of the run that an artifact belongs to, or of the artifact alone."""
    return Index(run_of(path.absolute()) or path.absolute())
