"""The published checkpoint: one way to write it under every parallel layout, validated before it is handed on."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from contracts.artifacts import Publication
from contracts.attempt import beat
from contracts.fingerprint import TOKENIZER_FILES
from contracts.ledger import Ledger
from contracts.models import VALUE_HEAD
from modeling.loading import Shapes

SHARD_BYTES = 5 << 30
"""Largest weights file."""


def save_checkpoint(
    publication: Publication,
    state: dict[str, Tensor],
    model: Any,
    *,
    start: Path,
    shapes: Shapes,
    dtype: torch.dtype,
    changes: dict[str, Any],
    unit: str,
    value_head: Tensor | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write and commit weights, configuration and tokenizer.

    Args:
        state: gathered weights by the names of `shapes`; tied ones under both names, because an engine that reloads
            weights keeps its old LM head where a checkpoint has none.
        model: the transformers model they belong to.
        start: directory of the model that training began with; its tokenizer files are copied byte for byte.
        shapes: what the architecture consists of.
        dtype: number format to store.
        changes: entries of `config.json` that training changed.
        unit: of the publication's ledger.
        value_head: of a policy that is its own critic, [1, hidden size].

    Raises:
        RuntimeError: a tensor is missing, empty, of another shape, or not finite.
    """
    _require_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, shapes)
    tensors = _separate(revert_weight_conversion(model, state), dtype)
    files = dict(_shards(tensors, shard_bytes))
    if value_head is not None:
        files[VALUE_HEAD] = _separate({"weight": value_head}, torch.float32)
    for name, group in files.items():
        beat()
        scratch = publication.scratch(name)
        _save(group, scratch)
        _validate(scratch, group)
        publication.commit(name, Ledger(unit))
    names = dict(_index(tensors, shard_bytes))
    if len(set(names.values())) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": names}
        _write_json(publication, "model.safetensors.index.json", index, unit)
    _write_json(publication, "config.json", _config(start, model.config, dtype, changes), unit)
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (start / name).is_file():
            _copy(publication, start / name, unit)


def _require_shapes(found: Shapes, expected: Shapes) -> None:
    if found == expected:
        return
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    name = wrong[0]
    raise RuntimeError(
        f"the checkpoint is wrong in {len(wrong)} tensors, first {name}: shape {found.get(name)} instead of "
        f"{expected.get(name)}"
    )


def _separate(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """On the CPU, in the format to store, and none sharing memory with another (tied weights do)."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(state.items()):
        stored = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        tensors[name] = stored.clone() if stored.data_ptr() in seen else stored
        seen.add(stored.data_ptr())
    return tensors


def _index(tensors: dict[str, Tensor], shard_bytes: int) -> Iterator[tuple[str, str]]:
    """Each tensor's name and its file."""
    numbers: list[int] = []
    used = 0
    for tensor in tensors.values():
        fits = bool(numbers) and used + tensor.nbytes <= shard_bytes
        used = used + tensor.nbytes if fits else tensor.nbytes
        numbers.append(numbers[-1] if fits else len(set(numbers)) + 1)
    last = numbers[-1]
    for name, number in zip(tensors, numbers, strict=True):
        yield name, "model.safetensors" if last == 1 else f"model-{number:05d}-of-{last:05d}.safetensors"


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, file in _index(tensors, shard_bytes):
        groups.setdefault(file, {})[name] = tensors[name]
    yield from groups.items()


def _save(group: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(group, path, {"format": "pt"})
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):  # such as a full disk, in safetensors' own words
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def _validate(path: Path, expected: dict[str, Tensor]) -> None:
    """Read the file back: what is on the disk is what was meant, none of it empty or not finite."""
    with safe_open(path, "pt") as file:
        if set(file.keys()) != set(expected):
            raise RuntimeError(f"{path.name} does not hold the tensors that were written")
        for name in expected:
            tensor = file.get_tensor(name)
            if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
                raise RuntimeError(f"tensor {name} of the checkpoint is empty or not finite")
            if not torch.equal(tensor, expected[name]):
                raise RuntimeError(f"tensor {name} was not written as it is in memory")


def _config(start: Path, config: Any, dtype: torch.dtype, changes: dict[str, Any]) -> dict[str, Any]:
    """The start model's `config.json` with what changed, readable by transformers 4 and 5 alike.

    transformers 4 looks for `torch_dtype` and for the rotary embedding's settings in `rope_theta` and `rope_scaling`;
    without them it silently assumes float32 and 10000.
    """
    data: dict[str, Any] = json.loads((start / "config.json").read_bytes())
    name = str(dtype).removeprefix("torch.")
    data.update(changes, dtype=name, torch_dtype=name)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope:
        data["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            data["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return data


def _copy(publication: Publication, source: Path, unit: str) -> None:
    if source.name == "tokenizer_config.json":
        data = json.loads(source.read_bytes())
        if data.get("tokenizer_class") == "TokenizersBackend":  # a name that only transformers 5 knows
            _write_json(publication, source.name, {**data, "tokenizer_class": "PreTrainedTokenizerFast"}, unit)
            return
    shutil.copyfile(source, publication.scratch(source.name))
    publication.commit(source.name, Ledger(unit))


def _write_json(publication: Publication, name: str, data: dict[str, Any], unit: str) -> None:
    publication.scratch(name).write_text(
        json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    publication.commit(name, Ledger(unit))
