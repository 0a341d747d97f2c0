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


class Sequences:
    """A group of processes that share each micro-batch; attention finds this process's group in `current`."""

    current: "Sequences"

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        Sequences.current = self

    def tokens(self, batch: Packed) -> int:
        """Number of a micro-batch's tokens in each process, including the last one's padding."""
        return -(-int(batch.input_ids.numel()) // int(self.size))

    def part(self, batch: Packed) -> Packed:
        """The micro-batch with this process's tokens only, and the attention plan of the whole micro-batch.

        It is always flat: the config refuses parallel.sp with packing=padded, and `check_layout` models without flat
        batches.
        """
        count = self.tokens(batch)
        missing = count * self.size - batch.input_ids.numel()
        mine = slice(self.rank * count, (self.rank + 1) * count)
        ids, places = (nn.functional.pad(tensor, (0, missing)) for tensor in (batch.input_ids, batch.position_ids))
        return batch._replace(input_ids=ids[:, mine], position_ids=places[:, mine])

    def join(self, hidden: Tensor, batch: Packed) -> Tensor:
        """Gather the hidden states of all tokens, [T, hidden size]."""
        whole: Tensor = _Join.apply(hidden, self)  # type: ignore[no-untyped-call]
        return whole[: batch.input_ids.numel()]


def _exchange(parts: Tensor, group: Any) -> Tensor:
    found = parts.new_empty(parts.shape)  # contiguous
    dist.all_to_all_single(found, parts.contiguous(), group=group)
    return found


class _Exchange(torch.autograd.Function):
    """All-to-all of [size, ...]: part i is exchanged with process i. It is its own inverse, and so its own gradient."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchange(parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None


class _Join(torch.autograd.Function):
    """All-gather of all processes' rows.

    Each process computes the same loss from them, divided by the number of processes, so the gradient of its own rows
    is its part of the gradient times that number: no collective is needed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences
        whole = rows.new_empty(sequences.size, *rows.shape)
        dist.all_gather(list(whole), rows.contiguous(), group=sequences.group)
        return whole.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        sequences = ctx.sequences
        return gradient.chunk(sequences.size)[sequences.rank] * sequences.size, None


def attend_spread(
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
    sequences = Sequences.current
    size, count = sequences.size, query.shape[2]
    spread = []
    for tensor in (query, key, value):
        parts = tensor[0].unflatten(0, (size, -1))  # [size, heads / size, C, head size]
        exchanged = _Exchange.apply(parts, sequences.group)  # type: ignore[no-untyped-call]
        spread.append(exchanged.transpose(0, 1).flatten(1, 2)[None])
    query, key, value = spread
    found, _ = attend(
        module, query, key, value, attention_mask, plan=plan, **options
    )  # [1, T, heads / size, head size]
    whole = nn.functional.pad(found[0], (0, 0, 0, 0, 0, size * count - found.shape[1]))
    back = _Exchange.apply(whole.unflatten(0, (size, count)), sequences.group)  # type: ignore[no-untyped-call]
    return back.transpose(0, 1).flatten(1, 2)[None], None


AttentionInterface.register(NAME, attend_spread)
