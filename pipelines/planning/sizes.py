"""Reads the sizes of existing models from their config.json and file headers, without torch."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from contracts.fingerprint import MODEL_FILES
from contracts.model_size import Size, is_head, size_from_config
from pipelines.planning.hub import name_and_revision


def read_size(model: Path) -> Size | None:
    """The size of a model: shapes from config.json, parameter counts from the headers of its safetensors files.

    For a model on the Hub (hf:ORG/NAME), a config.json in the local cache is enough. None if the size cannot be read.
    """
    file = config_file(model)
    config = _read_json(file) if file else None
    if config is None:
        return None
    text = {**config, **(config.get("text_config") or {})}
    try:
        size = size_from_config(text)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    others = sum((model / name).stat().st_size for name in MODEL_FILES if (model / name).is_file())
    size = replace(size, other_files=others)
    tensors: dict[str, int] = {}
    for file in sorted(model.glob("*.safetensors")):
        header = _header(file)
        if header is None:
            return None
        tensors |= header
    if not tensors:
        is_classifier = str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")
        return size.as_classifier() if is_classifier else size
    if "tie_word_embeddings" not in text:  # its default depends on the architecture
        size = replace(size, tied=not any(map(is_head, tensors)))
    head = sum(count for name, count in tensors.items() if is_head(name)) if size.tied else 0
    total = sum(tensors.values())
    classifier = any(name.startswith("score.") for name in tensors)
    return replace(size, parameters=total - head, tensors=tensors, classifier=classifier)


def config_file(model: Path) -> Path | None:
    """The config.json of a model directory, or of hf:ORG/NAME[@REVISION] in the local cache; None if it is not
    there."""
    if not str(model).startswith("hf:"):
        return model / "config.json"
    from huggingface_hub import try_to_load_from_cache  # slow to import, so only if needed
    from huggingface_hub.errors import HFValidationError

    name, revision = name_and_revision(model)
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if it cannot be read. Errors are not reported by an estimate."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _header(file: Path) -> dict[str, int] | None:
    """The number of elements of each tensor of a safetensors file, from its header; None if it is damaged."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length) if length < file.stat().st_size else b"")
        return {name: math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
