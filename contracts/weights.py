"""Reads and verifies the headers of a model directory's safetensors files, not the weights. Needs no torch or numpy."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from contracts.errors import UserError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""The index of a model with several files: which tensor is in which file."""
DIVIDED = "reallocation.json"
"""Marks a checkpoint that `pipeline reshard` has divided by rank."""
AGAIN = "Download or save it again."
LFS = b"version https://git-lfs"
"""The beginning of a Git LFS pointer file, whose content has not been fetched."""
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
"""Bytes per number of each dtype; 1 for all others."""


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor of a safetensors file."""

    name: str
    dtype: str
    """The dtype as safetensors names it: F32, BF16, ..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of its first byte in the file."""
    end: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the tensors' metadata from a safetensors file.

    Raises:
        UserError: it has no header, or its size does not match the header.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(LFS))
        stream.seek(8)
        length = int.from_bytes(start[:8], "little")
        content = stream.read(length) if 2 <= length < size else b""
    base, found = 8 + length, {}
    try:
        header = json.loads(content)
        for name, tensor in header.items():
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                shape = tuple(map(int, tensor["shape"]))
                found[name] = StoredTensor(name, tensor["dtype"], shape, file, base + first, base + last)
    except (ValueError, TypeError, KeyError, AttributeError):
        found = {}
    if not found and start == LFS:
        raise UserError(
            f"{file} is a pointer of Git LFS, not the weights (a clone without git-lfs). Run `git lfs pull` there, "
            "or download it again."
        )
    if not found or max(tensor.end for tensor in found.values()) != size:
        raise UserError(f"{file} is cut off or damaged: it is not a complete safetensors file. {AGAIN}")
    for tensor in found.values():
        wanted = math.prod(tensor.shape) * BYTES.get(tensor.dtype, 1)
        if tensor.end - tensor.start != wanted and not tensor.dtype.startswith(("F4", "F6")):  # parts of a byte
            raise UserError(
                f"{file} is damaged: {tensor.name} of shape {list(tensor.shape)} ({tensor.dtype}) takes {wanted} "
                f"bytes, but has {tensor.end - tensor.start}. {AGAIN}"
            )
    place = base
    for tensor in sorted(found.values(), key=lambda each: (each.start, each.end)):
        if tensor.start != place:
            raise UserError(
                f"{file} is damaged: {tensor.name} begins at byte {tensor.start} instead of {place}, where "
                f"the previous tensor ends. {AGAIN}"
            )
        place = tensor.end
    return found


def stored_tensors(model: Path) -> dict[str, StoredTensor]:
    """The tensors that a loader reads from a model directory: those of model.safetensors, or of the files in the index.

    Raises:
        UserError: a file or the index is missing or damaged, or the index names a tensor that its file does not hold.
    """
    if (model / WHOLE).is_file():
        return read_header(model / WHOLE)
    if (model / DIVIDED).is_file():
        raise UserError(
            f"{model} is divided into files for the ranks of a parallel layout, which no stage reads. Make it whole "
            f"again: `pipeline reshard {model} --to tp=1 --output DIRECTORY`, and give DIRECTORY."
        )
    if not (model / INDEX).is_file():
        found = ", ".join(file.name for file in sorted(model.glob("*.safetensors"))[:3])
        raise UserError(
            f"{model} has neither {WHOLE} nor {INDEX}, which lists the content of {found}; without it no library can "
            "load the weights. Download or save the whole model again."
        )
    names = _read_index(model / INDEX)
    files = sorted(set(names.values()))
    if missing := [file for file in files if not (model / file).is_file()]:
        raise UserError(
            f"{model} lacks {len(missing)} of its {len(files)} weight files: {', '.join(missing[:3])}"
            f"{' …' if len(missing) > 3 else ''}. Download or copy them again."
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(model / file).items():
            if name in tensors:
                raise UserError(
                    f"{model} holds {name} twice, in {tensors[name].file.name} and in {file}, so it is ambiguous. "
                    "Download or save the model again."
                )
            tensors[name] = tensor
    for name, file in names.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{model / INDEX} says that {name} is in {file}, which does not hold it. {AGAIN}")
    return tensors


def _read_index(file: Path) -> dict[str, str]:
    try:
        data: Any = json.loads(file.read_text())
        names = data["weight_map"]
        whole = bool(names) and all(isinstance(name, str) and "/" not in name for name in names.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{file} is not an index of safetensors files (a JSON object with a weight_map). {AGAIN}")
    return dict(names)
