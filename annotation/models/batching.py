"""Builds batches under a token budget: flat batches of rows that share prompts, or padded ones of similar lengths."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple, TypeVar

import numpy as np

from annotation.samples import Sample
from modeling.packing import tokens_of
from modeling.rows import Response, Row, token_ids

T = TypeVar("T")
MAX_GATHERED = 4
"""Limit on the keys and values that attention gathers for whole sequences, prompts included, in multiples of the token
budget."""


class Piece(NamedTuple):
    """A row, or a part of one with as many of its responses as fit a forward pass."""

    place: int
    """Index of the row."""
    first: int
    """Index of the piece's first response in the row."""
    row: Row


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide sequences into batches of at most `budget` tokens, padding included.

    Args:
        lengths: number of tokens of each sequence.
        budget: maximum of rows times the longest row of a batch; a longer sequence gets a batch of its own.

    Returns:
        Indices into `lengths`, longest first, so that a batch that does not fit into memory fails at once.
    """
    result: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= budget:
            result[-1].append(index)
        else:
            result.append([index])
    return result


def row_batches(rows: Sequence[Row], budget: int, limit: int) -> list[list[Piece]]:
    """Divide rows into flat batches in which each prompt occurs once.

    Args:
        budget: maximum tokens of a batch; a row with more gets a batch of its own.
        limit: maximum tokens of a row; a row with more is split, and its prompt computed again for each piece.

    Returns:
        Batches of rows with similar lengths, longest first. Each response is in exactly one of them.
    """
    pieces = [piece for index, row in enumerate(rows) for piece in _pieces(index, row, limit)]
    result: list[list[Piece]] = []
    tokens = gathered = 0
    for piece in sorted(pieces, key=lambda piece: (-piece.row.longest, piece.place, piece.first)):
        tokens += tokens_of(piece.row, "shared")
        gathered += piece.row.tokens
        if result and tokens <= budget and gathered <= MAX_GATHERED * budget:
            result[-1].append(piece)
        else:
            result.append([piece])
            tokens, gathered = tokens_of(piece.row, "shared"), piece.row.tokens
    return result


def _pieces(index: int, row: Row, limit: int) -> Iterator[Piece]:
    width, first = len(row.prompt), 0
    while first < len(row.responses):
        count, tokens = 0, width
        for response in row.responses[first:]:
            tokens += len(response.ids)
            gathered = tokens + count * width
            if count and (tokens > limit or gathered > MAX_GATHERED * limit):
                break
            count += 1
        yield Piece(index, first, Row(row.row_id, row.prompt, row.responses[first : first + count]))
        first += count


def shared_row(sequences: Sequence[Sequence[int]], most: int | None = None) -> Row:
    """A row whose prompt is the common prefix of the sequences, of at most `most` tokens, and whose responses are the
    rest of each."""
    ids = [token_ids(sequence) for sequence in sequences]
    shortest = min([*map(len, ids), *([] if most is None else [most])])
    differs = np.zeros(shortest, dtype=bool)
    for other in ids[1:]:
        differs |= other[:shortest] != ids[0][:shortest]
    width = int(differs.argmax()) if differs.any() else shortest
    return Row("", ids[0][:width], tuple(Response(each[width:]) for each in ids))


def by_rollout(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of the samples, grouped by rollout."""
    return [list(group) for _, group in groupby(range(len(samples)), key=lambda index: id(samples[index].rollout))]


def chunks(items: Iterable[T], size: Callable[[T], int], least: int) -> Iterator[list[T]]:
    """Divide items into consecutive chunks with a total size of at least `least`; the last one may be smaller."""
    chunk: list[T] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if total >= least:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Prefetch: yield the same items, computing each in a thread while the previous one is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
