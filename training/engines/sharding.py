"""Sharding of a model's parameters in the native engine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from reallocation.layouts import INPUT_SPLIT, OUTPUT_SPLIT

COLUMN_PARALLEL = OUTPUT_SPLIT
"""Column-parallel projections, whose outputs are sharded: Shard(0) of weight and bias."""
ROW_PARALLEL = INPUT_SPLIT
"""Row-parallel projections, whose inputs are sharded: Shard(1) of the weight; the bias is replicated."""
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Norms within a head: replicated, but each process applies them to its own heads, so their gradients are summed."""


@dataclass
class ShardedParameter:
    """A parameter of the whole module, and this process's shard of it."""

    names: list[str]
    """All names of the parameter; the first identifies it (for a tied head, the embedding's)."""
    shape: tuple[int, ...]
    """Shape of the unsharded tensor."""
    dtype: torch.dtype
    trained: bool
    stages: list[int]
    """Pipeline stages that have the parameter; the first one's copy is saved, and counts in the gradient norm."""
    layer_name: str = ""
    """Name within its layer; empty for parameters outside of the layers."""
    local: nn.Parameter | None = None
    """This process's shard; None if its pipeline stage does not have the parameter."""

    @property
    def tensor_dim(self) -> int | None:
        """The dimension that tensor parallelism shards; None if the parameter is replicated."""
        if self.layer_name.startswith(COLUMN_PARALLEL):
            return 0
        return 1 if self.layer_name.startswith(ROW_PARALLEL) and self.layer_name.endswith("weight") else None


def local_tensor(tensor: Any) -> Tensor:
    """The local shard of a DTensor, or a plain tensor itself; shares the memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


def all_gather(tensor: Tensor, count: int, group: Any) -> list[Tensor]:
    """All-gather a tensor that has the same shape in all `count` processes of the group."""
    found = [torch.empty_like(tensor) for _ in range(count)]
    dist.all_gather(found, tensor.contiguous(), group=group)
    return found


def sharded_dims(tensor: Any) -> Iterator[tuple[str, int]]:
    """Yield (mesh dimension, tensor dimension) for each sharded placement of a DTensor."""
    if isinstance(tensor, DTensor):
        names = tensor.device_mesh.mesh_dim_names
        for name, placement in zip(names or (), tensor.placements, strict=True):
            if isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard":
                yield name, placement.dim  # type: ignore[attr-defined]
