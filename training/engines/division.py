"""How the native engine divides a model's parameters between processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from reallocation.layouts import INPUTS, OUTPUTS

COLUMNS = OUTPUTS
"""Projections whose outputs are divided over tensor parallel processes: Shard(0) of weight and bias."""
ROWS = INPUTS
"""Projections whose inputs are divided: Shard(1) of the weight; the bias is whole."""
OF_ONE_HEAD = ("self_attn.q_norm", "self_attn.k_norm")
"""Whole in every process, but used by each on its own heads: their gradients are added up."""


@dataclass
class DividedParameter:
    """A parameter of the whole module, and what this process has of it."""

    names: list[str]
    """All of them, the first being the one that it is known by: a tied head has the embedding's."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    trained: bool
    stages: list[int]
    """Pipeline stages that have it; the first of them is the one that counts."""
    layer_name: str = ""
    """Name inside of its layer; empty outside of the layers."""
    local: nn.Parameter | None = None
    """None where this process's stage does not have it."""

    @property
    def tensor_dim(self) -> int | None:
        """The dimension that tensor parallelism divides; None: none."""
        if self.layer_name.startswith(COLUMNS):
            return 0
        return 1 if self.layer_name.startswith(ROWS) and self.layer_name.endswith("weight") else None


def local(tensor: Any) -> Tensor:
    """This process's part of a DTensor; another tensor itself. Shares its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


def all_gather(tensor: Tensor, count: int, group: Any) -> list[Tensor]:
    """The tensors of all processes of a group, which have the same shape."""
    found = [torch.empty_like(tensor) for _ in range(count)]
    dist.all_gather(found, tensor.contiguous(), group=group)
    return found


def divisions(tensor: Any) -> Iterator[tuple[str, int]]:
    """Along which dimensions of the mesh a tensor is divided, and along which of its own."""
    if isinstance(tensor, DTensor):
        names = tensor.device_mesh.mesh_dim_names
        for name, placement in zip(names or (), tensor.placements, strict=True):
            if isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard":
                yield name, placement.dim  # type: ignore[attr-defined]
