"""Writes the published checkpoint, the same way under every parallel layout, and validates the files."""

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

from contracts.attempt import beat
from contracts.fingerprint import PROCESSOR_FILES, TOKENIZER_FILES
from contracts.ledger import Ledger
from contracts.models import MASTER, VALUE_HEAD
from contracts.publication import Publication
from modeling.loading import Shapes
from modeling.master import WEIGHTS_DIGEST, MasterWeights, has_remainder, split, weights_digest

SHARD_BYTES = 5 << 30
"""Maximum size of a weights file."""


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
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write and commit weights, configuration and tokenizer. Tied weights are stored once.

    For bfloat16, the remainders to fp32 are stored in further files, for the next training (`modeling/master.py`).

    Args:
        state: gathered weights by the names of `shapes`, tied ones under both names; in fp32 where they were trained.
        model: the transformers model they belong to.
        start: directory of the model that training began with; its tokenizer files are copied byte for byte, except for
            the name of a tokenizer class that transformers 4 does not know.
        shapes: name and shape of every tensor of the architecture.
        dtype: number format to store.
        changes: entries of `config.json` that training changed.
        unit: unit of the publication's ledger.
        value_head: weight of the value head of a policy that is its own critic, [1, hidden size].
        tokenizer: directory whose tokenizer files are copied instead of those of `start`.
        shard_bytes: maximum size of a weights file.

    Returns:
        Facts for the manifest: for bfloat16, how much of the training's update survives rounding (`update_kept`).

    Raises:
        RuntimeError: a tensor is missing, empty, of another shape, or not finite, or tied weights differ.
    """
    _require_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, shapes)
    deduplicated = _without_tied_copies(state, model)
    whole = revert_weight_conversion(model, dict(deduplicated))
    facts: dict[str, Any] = {}
    remainders: dict[str, Tensor] = {}
    if dtype == torch.bfloat16:
        tensors, remainders = _split_precision(whole)
        facts = _update_kept(start, whole, tensors)
    else:
        tensors = _convert(whole, dtype)
    files = dict(_shards(tensors, shard_bytes))
    if value_head is not None:
        files[VALUE_HEAD] = _convert({"weight": value_head}, torch.float32)
    for name, group in files.items():
        _commit(publication, name, group, unit)
    if remainders:
        hashes = {name: _sha256(publication, name) for name in files if name != VALUE_HEAD}
        for name, group in _shards(remainders, shard_bytes):
            _commit(publication, f"{MASTER}/{name}", group, unit, **{WEIGHTS_DIGEST: weights_digest(hashes)})
    names = dict(_index(tensors, shard_bytes))
    if len(set(names.values())) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": names}
        _write_json(publication, "model.safetensors.index.json", index, unit)
    tied = {"tie_word_embeddings": True} if len(deduplicated) < len(state) else {}
    _write_json(publication, "config.json", _config(start, model.config, dtype, {**tied, **changes}), unit)
    for name in ("generation_config.json", *PROCESSOR_FILES, *TOKENIZER_FILES):
        source = (tokenizer if tokenizer and name in TOKENIZER_FILES else start) / name
        if source.is_file():
            _copy(publication, source, unit)
    return facts


def _require_shapes(found: Shapes, expected: Shapes) -> None:
    if found == expected:
        return
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    name = wrong[0]
    raise RuntimeError(
        f"the checkpoint is wrong in {len(wrong)} tensors, first {name}: shape {found.get(name)} instead of "
        f"{expected.get(name)}"
    )


def _without_tied_copies(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The state without the second names of tied weights, as transformers and vLLM store it."""
    kept = dict(state)
    for second, first in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if second in state and first in state:
            if not torch.equal(state[second], state[first].to(state[second].dtype)):
                raise RuntimeError(f"{second} and {first} are tied, but differ after training")
            del kept[second]
    return kept


def _split_precision(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the state into bfloat16 tensors on the CPU and their nonzero remainders to fp32."""
    rounded: dict[str, Tensor] = {}
    remainders: dict[str, Tensor] = {}
    for name, tensor in sorted(state.items()):
        rounded[name] = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        if not bool(torch.isfinite(rounded[name]).all()):
            raise RuntimeError(f"tensor {name} of the checkpoint is empty or not finite")
        if tensor.is_floating_point():
            rounded[name], remainder = split(rounded[name])
            if has_remainder(remainder):
                remainders[name] = remainder
    return rounded, remainders


def _update_kept(start: Path, whole: dict[str, Tensor], stored: dict[str, Tensor]) -> dict[str, Any]:
    """Measure how much of the training's update survives in bfloat16, over the tensors that both checkpoints have.

    norm: (u · v) / (u · u), for the update u of the fp32 weights and the change v of the bfloat16 weights; 1 if nothing
    is lost. weights: the share of updated fp32 weights whose bfloat16 value has changed.
    """
    before = MasterWeights(start)
    square = product = 0.0
    moved = changed = 0
    for name, tensor in stored.items():
        known = before.tensors.get(name)
        if known is None or known.shape != tuple(tensor.shape) or not tensor.is_floating_point():
            continue
        old = before.read(name)
        update = whole[name].detach().to("cpu", torch.float32) - old
        change = tensor.float() - split(old)[0].float()
        square += float(update.double().square().sum())
        product += float((update.double() * change.double()).sum())
        moved += int((update != 0).sum())
        changed += int(((update != 0) & (change != 0)).sum())
    if not moved:
        return {}
    return {"update_kept": {"norm": product / square, "weights": changed / moved}}


def _sha256(publication: Publication, name: str) -> str:
    receipt = publication.receipt(name)
    assert receipt is not None
    return receipt.file.sha256


def _commit(publication: Publication, name: str, group: dict[str, Tensor], unit: str, **metadata: str) -> None:
    beat()
    scratch = publication.scratch(name)
    _save(group, scratch, {"format": "pt", **metadata})
    _validate(scratch, group)
    publication.commit(name, Ledger(unit))


def _convert(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copy tensors to the CPU in the stored dtype, without the memory sharing of tied weights."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(state.items()):
        stored = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        tensors[name] = stored.clone() if stored.data_ptr() in seen else stored
        seen.add(stored.data_ptr())
    return tensors


def _index(tensors: dict[str, Tensor], shard_bytes: int) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name with the name of its file."""
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


def _save(group: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(group, path, metadata)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):  # a full disk, for example
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def _validate(path: Path, expected: dict[str, Tensor]) -> None:
    """Read the file back and verify that its tensors are the written ones, not empty, and finite."""
    with safe_open(path, "pt") as file:
        if set(file.keys()) != set(expected):
            raise RuntimeError(f"{path.name} does not hold the tensors that were written")
        for name in expected:
            tensor = file.get_tensor(name)
            if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
                raise RuntimeError(f"tensor {name} of the checkpoint is empty or not finite")
            if not torch.equal(tensor, expected[name]):
                raise RuntimeError(f"tensor {name} was not written correctly: it differs from memory")


def _config(start: Path, config: Any, dtype: torch.dtype, changes: dict[str, Any]) -> dict[str, Any]:
    """The initial model's `config.json` with the changes, readable by transformers 4 and 5.

    transformers 4 reads the dtype from `torch_dtype`, and the rotary embedding's settings from `rope_theta` and
    `rope_scaling`; without them it silently assumes float32 and 10000.
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
        if data.get("tokenizer_class") == "TokenizersBackend":  # unknown to transformers 4
            _write_json(publication, source.name, {**data, "tokenizer_class": "PreTrainedTokenizerFast"}, unit)
            return
    shutil.copyfile(source, publication.scratch(source.name))
    publication.commit(source.name, Ledger(unit))


def _write_json(publication: Publication, name: str, data: dict[str, Any], unit: str) -> None:
    publication.scratch(name).write_text(
        json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    publication.commit(name, Ledger(unit))
