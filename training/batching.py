"""Assigns rows to optimizer steps, data parallel ranks and micro-batches. Pure functions.

The optimizer steps depend only on the data and on (seed, epoch). How a step is divided over processes and
micro-batches depends on the number of processes and the token budget, and must not change its result: every row
occurs once with weight 1, and every normalizer is computed from the rows of the step.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from contracts.seeds import derive_seed
from modeling.packing import Packing, tokens_of
from modeling.rows import Row


@dataclass(frozen=True)
class MicroBatchRows:
    """The row indices of one micro-batch: one forward and backward pass."""

    rows: tuple[int, ...]
    weight: float = 1.0
    """0 for a filler, which has no effect; it exists because every process must take part in every collective."""


def count_steps(rows: int, global_batch: int, epochs: int, max_steps: int | None) -> int:
    """Number of optimizer steps; the last batch of an epoch may be incomplete and is a step like any other."""
    total = epochs * math.ceil(rows / global_batch)
    return total if max_steps is None else min(total, max_steps)


def global_batches(
    rows: int, *, global_batch: int, epochs: int, seed: int, max_steps: int | None = None
) -> Iterator[tuple[int, ...]]:
    """The row indices of each optimizer step: every epoch is a permutation, decided by (seed, epoch)."""
    left = count_steps(rows, global_batch, epochs, max_steps)
    for epoch in range(epochs):
        order = list(range(rows))
        random.Random(derive_seed("order", seed, epoch)).shuffle(order)
        for start in range(0, rows, global_batch):
            if left == 0:
                return
            left -= 1
            yield tuple(order[start : start + global_batch])


def divide(
    batch: tuple[int, ...], rows: list[Row], *, processes: int, budget: int, packing: Packing
) -> list[list[MicroBatchRows]]:
    """The micro-batches of every data parallel rank, the same number for each.

    Rows are dealt round-robin by descending size, which balances the ranks and keeps padding low. A micro-batch holds
    at most `budget` tokens (including padding, if padded); a larger row gets a micro-batch of its own. Ranks with fewer
    micro-batches are filled up with the batch's smallest row at weight 0.
    """
    order = sorted(batch, key=lambda index: (-tokens_of(rows[index], packing), index))
    shares = [list(_fill(order[process::processes], rows, budget, packing)) for process in range(processes)]
    most = max(len(share) for share in shares)
    filler = MicroBatchRows((order[-1],), 0.0)
    return [share + [filler] * (most - len(share)) for share in shares]


def _fill(order: list[int], rows: list[Row], budget: int, packing: Packing) -> Iterator[MicroBatchRows]:
    """Greedily fill micro-batches with rows in the given order."""
    current: list[int] = []
    tokens = sequences = width = 0
    for index in order:
        row = rows[index]
        tokens += tokens_of(row, packing)
        sequences += len(row.responses)
        width = max(width, row.longest)
        if current and (sequences * width if packing == "padded" else tokens) > budget:
            yield MicroBatchRows(tuple(current))
            current = []
            tokens, sequences, width = tokens_of(row, packing), len(row.responses), row.longest
        current.append(index)
    if current:
        yield MicroBatchRows(tuple(current))
