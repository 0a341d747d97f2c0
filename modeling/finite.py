"""Reading all weights of a model once, for numbers that are none.

A number is NaN or infinite where all bits of its exponent are set, so that the bits as an integer say it: by one
comparison with the largest and one with the smallest, at the speed of the memory and without a copy.
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
"""Files (path, bytes, time of change) that this process has read already."""


def require_finite(model: Path) -> None:
    """Check that every weight of a model is a number. What a stage of ours has published was checked by it.

    Of several processes that load one model, the first checks.

    Raises:
        UserError: a tensor holds NaN or infinity; all such are named.
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
            "back to a checkpoint from before it broke (a training that diverged writes such)."
        )
    _CHECKED.add(identity)


def holds_the_same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors have the same format, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left, right = (np.memmap(each.file, np.uint8, "r", each.start, (each.end - each.start,)) for each in (one, other))
    return all(
        np.array_equal(left[start : start + CHUNK], right[start : start + CHUNK])
        for start in range(0, len(left), CHUNK)
    )


def is_finite(tensor: StoredTensor) -> bool:
    """Whether a stored tensor holds no NaN and no infinity; formats that have neither, or no exponent, hold none."""
    limit = INFINITY.get(tensor.dtype)
    if limit is None or tensor.start == tensor.end:
        return True
    width = (tensor.end - tensor.start) // int(np.prod(tensor.shape, dtype=np.int64))
    bits = np.memmap(tensor.file, np.uint8, "r", tensor.start, (tensor.end - tensor.start,))
    for start in range(0, len(bits), CHUNK):
        beat()
        part = np.frombuffer(bits[start : start + CHUNK], dtype=f"<u{width}")
        # Without a sign: those from +infinity on. With one: as unsigned numbers, the largest are those of -infinity.
        if int(part.view(f"<i{width}").max()) >= limit or int(part.max()) >= limit + (1 << (8 * width - 1)):
            return False
    return True
