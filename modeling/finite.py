"""Checks a model's weights for NaN and infinity.

A float is NaN or infinite if all bits of its exponent are set, so two integer comparisons of the raw bits decide it, at
memory bandwidth and without a copy.
"""

import os
from pathlib import Path

import numpy as np

from contracts.artifacts import Artifact
from contracts.attempt import beat
from contracts.errors import UserError
from contracts.manifest import MANIFEST
from contracts.weights import StoredTensor, stored_tensors

INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "BF16": 0x7F80, "F16": 0x7C00}
"""The bits of +infinity in each format; larger ones without the sign are NaN."""
CHUNK = 64 << 20
_CHECKED: set[tuple[tuple[str, int, int], ...]] = set()
"""Files (path, bytes, modification time) that this process has already checked."""


def require_finite(model: Path) -> None:
    """Check that a model's weights contain no NaN or infinity.

    Skips published checkpoints, which were checked when they were written. If several processes load the model, only
    rank 0 checks.

    Raises:
        UserError: tensors contain NaN or infinity; the message names them.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if (model / MANIFEST).is_file() and Artifact.open(model).manifest.weights:
        return
    tensors = stored_tensors(model).values()
    files = [(file, file.stat()) for file in sorted({tensor.file for tensor in tensors})]
    identity = tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in files)
    if identity in _CHECKED:
        return
    broken = [tensor.name for tensor in tensors if not is_finite(tensor)]
    if broken:
        raise UserError(
            f"{model} holds weights that are NaN or infinite: {', '.join(broken[:3])}"
            f"{f' and {len(broken) - 3} more tensors' if len(broken) > 3 else ''}. Download the model again, or go "
            "back to an earlier checkpoint (a training that diverged writes such weights)."
        )
    _CHECKED.add(identity)


def is_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors have the same format, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left, right = (np.memmap(each.file, np.uint8, "r", each.start, (each.end - each.start,)) for each in (one, other))
    return all(
        np.array_equal(left[start : start + CHUNK], right[start : start + CHUNK])
        for start in range(0, len(left), CHUNK)
    )


def is_finite(tensor: StoredTensor) -> bool:
    """Whether a stored tensor contains no NaN or infinity; True for formats that cannot represent them."""
    limit = INFINITY.get(tensor.dtype)
    if limit is None or tensor.start == tensor.end:
        return True
    width = (tensor.end - tensor.start) // int(np.prod(tensor.shape, dtype=np.int64))
    bits = np.memmap(tensor.file, np.uint8, "r", tensor.start, (tensor.end - tensor.start,))
    for start in range(0, len(bits), CHUNK):
        beat()
        part = np.frombuffer(bits[start : start + CHUNK], dtype=f"<u{width}")
        # Positive: at least +infinity as a signed integer. Negative: at least -infinity as an unsigned one.
        if int(part.view(f"<i{width}").max()) >= limit or int(part.max()) >= limit + (1 << (8 * width - 1)):
            return False
    return True
