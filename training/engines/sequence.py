"""Sequence parallelism for flat batches: each process computes a part of a micro-batch's tokens.

For attention, the processes of a group exchange tokens for heads with an all-to-all (DeepSpeed-Ulysses, Jacobs et al.
2023, arXiv 2309.14509): each then has all tokens of some heads, and runs `modeling/attention.py` on them. Everything
else in a layer works token by token. Before the LM head the hidden states of all tokens are gathered.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface

from modeling.attention import attend
from modeling.packing import Packed, PackingPlan

NAME = "packed_sequence_parallel"


class SequenceParallelGroup:
    """A group of processes that share each micro-batch; attention finds this process's group in `current`."""

    current: "SequenceParallelGroup"

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        SequenceParallelGroup.current = self

    def token_count(self, batch: Packed) -> int:
        """Number of a micro-batch's tokens in each process, including the last one's padding."""
        return -(-int(batch.input_ids.numel()) // int(self.size))

    def shard(self, batch: Packed) -> Packed:
        """The micro-batch with this process's tokens only, and the attention plan of the whole micro-batch.

        It is always flat: the config refuses parallel.sp with packing=padded, and `check_layout` models without flat
        batches.
        """
        count = self.token_count(batch)
        missing = count * self.size - batch.input_ids.numel()
        mine = slice(self.rank * count, (self.rank + 1) * count)
        ids, places = (nn.functional.pad(tensor, (0, missing)) for tensor in (batch.input_ids, batch.position_ids))
        return batch._replace(input_ids=ids[:, mine], position_ids=places[:, mine])

    def gather(self, hidden: Tensor, batch: Packed) -> Tensor:
        """Gather the hidden states of all tokens, [T, hidden size]."""
        whole: Tensor = _AllGather.apply(hidden, self)  # type: ignore[no-untyped-call]
        return whole[: batch.input_ids.numel()]


def _all_to_all(parts: Tensor, group: Any) -> Tensor:
    found = parts.new_empty(parts.shape)  # contiguous
    dist.all_to_all_single(found, parts.contiguous(), group=group)
    return found


class _AllToAll(torch.autograd.Function):
    """All-to-all of [size, ...]: part i is exchanged with process i. It is its own inverse, and so its own gradient."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradient, ctx.group), None


class _AllGather(torch.autograd.Function):
    """All-gather of all processes' rows.

    Each process computes the same loss from them, divided by the number of processes, so the gradient of its own rows
    is its part of the gradient times that number: no collective is needed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: SequenceParallelGroup) -> Tensor:
        ctx.group = group
        whole = rows.new_empty(group.size, *rows.shape)
        dist.all_gather(list(whole), rows.contiguous(), group=group.group)
        return whole.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        return gradient.chunk(group.size)[group.rank] * group.size, None


def attend_sequence_parallel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: PackingPlan,
    **options: Any,
) -> tuple[Tensor, None]:
    """`modeling.attention.attend` for tensors of this process's C tokens, [1, heads, C, head size]."""
    group = SequenceParallelGroup.current
    size, count = group.size, query.shape[2]
    exchanged = []
    for tensor in (query, key, value):
        parts = tensor[0].unflatten(0, (size, -1))  # [size, heads / size, C, head size]
        heads = _AllToAll.apply(parts, group.group)  # type: ignore[no-untyped-call]
        exchanged.append(heads.transpose(0, 1).flatten(1, 2)[None])
    query, key, value = exchanged
    found, _ = attend(
        module, query, key, value, attention_mask, plan=plan, **options
    )  # [1, T, heads / size, head size]
    whole = nn.functional.pad(found[0], (0, 0, 0, 0, 0, size * count - found.shape[1]))
    back = _AllToAll.apply(whole.unflatten(0, (size, count)), group.group)  # type: ignore[no-untyped-call]
    return back.transpose(0, 1).flatten(1, 2)[None], None


AttentionInterface.register(NAME, attend_sequence_parallel)
