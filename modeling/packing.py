"""Lays out a micro-batch's sequences without padding, so that a shared prompt is computed once.

Three layouts give the same results:

    shared   [prompt | response | response | prompt | response ...]   one row of tokens; a prompt occurs once
    flat     [prompt | response | prompt | response | ...]            one row, without sharing
    padded   one sequence per line, padded on the right               for models that packed attention does not support

In the first two a token attends only to the preceding tokens of its own sequence: `modeling/attention.py` splits the
batch into sequences for attention alone, by the `PackingPlan` built here.
"""

from collections.abc import Sequence as Many
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modeling.rows import Ids, Row

Packing = Literal["shared", "flat", "padded"]
PADDING_SHARE = 1.25
"""Without a variable-length kernel, attention runs on padded groups; padding adds at most this factor."""


class Span(NamedTuple):
    """The positions of a row's tokens in a flat batch with shared prompts."""

    prompt: slice
    responses: tuple[slice, ...]


class PackingPlan(NamedTuple):
    """Index tensors with which attention gathers a flat batch of T tokens into sequences, and scatters it back."""

    groups: tuple[Tensor, ...]
    """Groups of S sequences of similar length, padded to W: [S, W], indices into the flat batch (arbitrary in the
    padding)."""
    order: Tensor
    """[T]: index of each flat token in the concatenated, flattened groups."""
    whole: Tensor
    """[L]: the sequences without padding, for variable-length kernels: indices into the flat batch, one sequence after
    the other."""
    bounds: Tensor
    """[S + 1], int32: cumulative sequence lengths in `whole` (cu_seqlens)."""
    whole_order: Tensor
    """[T]: index of each flat token in `whole`."""
    longest: int
    """Tokens of the longest sequence."""
    spans: tuple[Span, ...] = ()
    """The rows, if attention also computes a shared prompt only once; empty: it does so once per response."""
    masks: dict[tuple[int, int, int | None], Tensor] = {}  # noqa: RUF012 (a new one is passed along with `spans`)
    """A cache of attention masks for `spans`, by prompt tokens, response tokens and window."""


class Packed(NamedTuple):
    """The model inputs of a micro-batch of S sequences with N response tokens in all."""

    input_ids: Tensor
    """[1, T], or [S, W] if padded."""
    position_ids: Tensor
    """Same shape: each token's position in its sequence."""
    plan: PackingPlan | None
    """None if padded."""
    positions: Tensor
    """[N], indices into the flattened `input_ids`: the token that predicts each response token."""
    targets: Tensor
    """[N]: the response tokens, one sequence after the other."""
    lengths: Tensor
    """[S]: response tokens of each sequence; they add up to N."""
    last: Tensor
    """[S], indices into the flattened `input_ids`: the last token of each sequence."""


def tokens_of(row: Row, packing: Packing) -> int:
    """The number of a row's tokens in a flat batch; in a padded batch, before padding."""
    return row.response_tokens + len(row.prompt) if packing == "shared" else row.tokens


def pack(rows: Many[Row], packing: Packing, device: torch.device | str = "cpu", *, attend_once: bool = False) -> Packed:
    """Pack rows into one micro-batch; its sequences are the rows' responses, in order.

    Args:
        attend_once: on a CPU, attention also computes a shared prompt only once. Meant for inference: the forward pass
            is the fastest, the backward pass is not.
    """
    if packing == "padded":
        return _pad(rows, device)
    packed = _flatten(rows, packing == "shared", device)
    if not attend_once or packing != "shared" or packed.plan is None:
        return packed
    return packed._replace(plan=packed.plan._replace(spans=_spans(rows), masks={}))


def _spans(rows: Many[Row]) -> tuple[Span, ...]:
    spans: list[Span] = []
    size = 0
    for row in rows:
        ends = np.cumsum([size + len(row.prompt), *(len(response.ids) for response in row.responses)]).tolist()
        spans.append(Span(slice(size, ends[0]), tuple(map(slice, ends[:-1], ends[1:]))))
        size = ends[-1]
    return tuple(spans)


def _flatten(rows: Many[Row], shared: bool, device: torch.device | str) -> Packed:
    ids: list[Ids] = []
    position_ids: list[Ids] = []
    wholes: list[Ids] = []  # for each sequence, the indices of its tokens in the flat batch
    starts: list[int] = []
    size = 0
    for row in rows:
        width = len(row.prompt)
        for number, response in enumerate(row.responses):
            if number == 0 or not shared:
                prompt = np.arange(size, size + width)
                ids.append(row.prompt)
                position_ids.append(np.arange(width))
                size += width
            own = np.arange(size, size + len(response.ids))
            ids.append(response.ids)
            position_ids.append(np.arange(width, width + len(response.ids)))
            size += len(response.ids)
            wholes.append(np.concatenate([prompt, own]))
            starts.append(width)
    positions = np.concatenate([whole[start - 1 : -1] for whole, start in zip(wholes, starts, strict=True)])
    return Packed(
        _tensor(np.concatenate(ids), device)[None],
        _tensor(np.concatenate(position_ids), device)[None],
        _plan(wholes, size, device),
        _tensor(positions, device),
        *_responses(rows, device),
        _tensor(np.array([whole[-1] for whole in wholes]), device),
    )


def _plan(wholes: list[Ids], size: int, device: torch.device | str) -> PackingPlan:
    """Group sequences by descending length."""
    groups: list[Tensor] = []
    order = np.zeros(size, dtype=np.int64)
    offset = 0
    left = sorted(wholes, key=len, reverse=True)
    while left:
        width, tokens, count = len(left[0]), 0, 0
        for whole in left:
            if width * (count + 1) > PADDING_SHARE * (tokens + len(whole)):
                break
            tokens, count = tokens + len(whole), count + 1
        index = np.zeros((count, width), dtype=np.int64)
        for line, whole in enumerate(left[:count]):
            index[line, : len(whole)] = whole
            # A shared prompt occurs in several sequences with equal values; any of its positions will do.
            order[whole] = offset + line * width + np.arange(len(whole))
        groups.append(_tensor(index, device))
        offset += count * width
        left = left[count:]
    whole = np.concatenate(wholes)
    whole_order = np.zeros(size, dtype=np.int64)
    whole_order[whole] = np.arange(len(whole))
    bounds = np.cumsum([0, *map(len, wholes)])
    return PackingPlan(
        tuple(groups),
        _tensor(order, device),
        _tensor(whole, device),
        _tensor(bounds, device).int(),
        _tensor(whole_order, device),
        max(map(len, wholes)),
    )


def _pad(rows: Many[Row], device: torch.device | str) -> Packed:
    sequences = [np.concatenate([row.prompt, response.ids]) for row in rows for response in row.responses]
    starts = [len(row.prompt) for row in rows for _ in row.responses]
    width = max(map(len, sequences))
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    for line, sequence in enumerate(sequences):
        input_ids[line, : len(sequence)] = sequence
    positions = [
        np.arange(start - 1, len(sequence) - 1) + line * width
        for line, (sequence, start) in enumerate(zip(sequences, starts, strict=True))
    ]
    last = np.array([line * width + len(sequence) - 1 for line, sequence in enumerate(sequences)])
    return Packed(
        _tensor(input_ids, device),
        _tensor(np.broadcast_to(np.arange(width), input_ids.shape), device),
        None,
        _tensor(np.concatenate(positions), device),
        *_responses(rows, device),
        _tensor(last, device),
    )


def _responses(rows: Many[Row], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The targets [N] and lengths [S] of `Packed`."""
    responses = [response.ids for row in rows for response in row.responses]
    return _tensor(np.concatenate(responses), device), _tensor(np.array([len(ids) for ids in responses]), device)


def _tensor(array: Ids, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
