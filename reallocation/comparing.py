"""Compares the tensors of two checkpoints, regardless of their layouts. Uses numpy, not torch.

    python -m reallocation CHECKPOINT CHECKPOINT      one JSON object, for `pipeline diff`

Both are read in pieces of the undivided tensors, so that memory does not grow with the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from contracts.weights import StoredTensor
from reallocation.layouts import GlobalTensor, flat_part
from reallocation.planning import item_bytes
from reallocation.stored import VALUE_HEAD_NAME, StoredModel, read_file

PIECE = 4 << 20
"""Elements that are compared at a time."""
FORMATS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8",
    "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|u1",
}  # fmt: skip
"""numpy's dtypes by safetensors' names; BF16 is missing, since numpy has none (it is the upper half of an F32)."""
KNOWN = {*FORMATS, "BF16"}


class Difference(msgspec.Struct, frozen=True):
    """A tensor that differs between two checkpoints."""

    name: str
    kind: str
    """The difference: `missing`, `shape`, `dtype` or `values`."""
    first: str | None
    """Dtype and shape in the first checkpoint; None: it has no such tensor."""
    second: str | None
    elements: int | None = None
    """The number of elements; None if they cannot be compared one by one."""
    differ: int | None = None
    """The number of elements that differ: in their bits if the dtypes are the same, otherwise in their value."""
    largest: float | None = None
    """The largest absolute difference of elements that are finite in both."""
    mean: float | None = None
    """The sum of these absolute differences, divided by `elements`."""
    not_finite: int | None = None
    """The number of differing elements that are NaN or infinite in at least one of the two."""


@dataclass(frozen=True)
class _Side:
    """A tensor of one of the checkpoints."""

    model: StoredModel
    tensor: GlobalTensor
    head: StoredTensor | None
    """The stored tensor, if this is the value head."""

    @property
    def description(self) -> str:
        return f"{self.tensor.dtype} {list(self.tensor.shape)}"

    def read(self, start: int, end: int) -> bytearray:
        """Read the bytes of elements `start` to `end` of the flattened, undivided tensor."""
        item = item_bytes(self.tensor.dtype)
        content = bytearray((end - start) * item)
        if self.head is not None:
            read_file(self.head.file, memoryview(content), self.head.start + start * item)
        else:
            self.model.read(self.tensor.name, flat_part(self.tensor, start, end), memoryview(content))
        return content


def compare(first: StoredModel, second: StoredModel) -> Iterator[Difference]:
    """Yield the tensors that differ: those of the first checkpoint in its order, then the others of the second."""
    left, right = _sides(first), _sides(second)
    for name in dict.fromkeys([*left, *right]):
        one, other = left.get(name), right.get(name)
        if one is None or other is None:
            yield Difference(name, "missing", one.description if one else None, other.description if other else None)
        elif one.tensor.shape != other.tensor.shape:
            yield Difference(name, "shape", one.description, other.description)
        elif one.tensor.dtype == other.tensor.dtype:
            if (numbers := _numbers(one, other))["differ"]:
                yield Difference(name, "values", one.description, other.description, **numbers)
        else:
            known = {one.tensor.dtype, other.tensor.dtype} <= KNOWN
            yield Difference(
                name, "dtype", one.description, other.description, **(_numbers(one, other) if known else {})
            )


def _sides(model: StoredModel) -> dict[str, _Side]:
    sides = {name: _Side(model, tensor, None) for name, tensor in model.tensors.items()}
    if (head := model.value_head()) is not None:
        sides[VALUE_HEAD_NAME] = _Side(model, GlobalTensor(VALUE_HEAD_NAME, head.dtype, head.shape), head)
    return sides


def _numbers(one: _Side, other: _Side) -> dict[str, Any]:
    """Count the elements that differ, and measure by how much if numpy supports their dtype."""
    formats = (one.tensor.dtype, other.tensor.dtype)
    measured = set(formats) <= KNOWN
    total, differ, broken, largest, absolute = one.tensor.elements, 0, 0, 0.0, 0.0
    for start in range(0, total, PIECE):
        end = min(start + PIECE, total)
        left, right = one.read(start, end), other.read(start, end)
        if formats[0] == formats[1]:
            if left == right:
                continue
            width = f"<u{item_bytes(formats[0])}"
            changed = np.flatnonzero(np.frombuffer(left, width) != np.frombuffer(right, width))
        else:
            changed = np.arange(end - start)
        if measured:
            values = [decode(left, formats[0])[changed], decode(right, formats[1])[changed]]
            a, b = (value.astype(np.float64) for value in values)
            if formats[0] != formats[1]:
                unequal = ~((a == b) | (np.isnan(a) & np.isnan(b)))
                a, b, changed = a[unequal], b[unequal], changed[unequal]
            finite = np.isfinite(a) & np.isfinite(b)
            distance = np.abs(a[finite] - b[finite])
            broken += int((~finite).sum())
            largest = max(largest, float(distance.max(initial=0.0)))
            absolute += float(distance.sum())
        differ += len(changed)
    if not measured:
        return {"elements": total, "differ": differ}
    mean = absolute / total if total else 0.0
    return {"elements": total, "differ": differ, "largest": largest, "mean": mean, "not_finite": broken}


def decode(content: bytes | bytearray, dtype: str) -> Any:
    """Decode numbers of a safetensors dtype; BF16 becomes float32."""
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(content, FORMATS[dtype])


def comparison(first: Path, second: Path, base: Path | None) -> dict[str, Any]:
    """The result that `pipeline diff` shows: the differences, and the number of tensors in either checkpoint."""
    models = [StoredModel(path, base=base) for path in (first, second)]
    names = {name for model in models for name in model.tensors}
    names |= {VALUE_HEAD_NAME for model in models if model.value_head() is not None}
    differences = [msgspec.to_builtins(difference) for difference in compare(*models)]
    return {"first": str(first), "second": str(second), "tensors": len(names), "differences": differences}
