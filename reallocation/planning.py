"""From any layout to any other: which bytes go from which rank to which. Pure, and the same at every call.

A part of a tensor is at most three blocks of its rows (`LocalPart`: a first and a last row that are not full, and what
is between), and so is what two parts have in common. Each common block is one transfer: equal runs of bytes at equal
distances, on both sides; where runs touch on both sides they are one.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from contracts.weights import BYTES
from reallocation.layouts import Division, GlobalTensor, LocalPart


class Transfer(NamedTuple):
    """Bytes of one tensor that one rank has of another: `rows` runs of `length` bytes.

    Run i begins at start + i · stride, of the source's part and of the target's part of the tensor.
    """

    source: int
    """Rank in the source layout."""
    target: int
    """Rank in the target layout."""
    tensor: str
    rows: int
    length: int
    source_start: int
    source_stride: int
    target_start: int
    target_stride: int

    @property
    def bytes(self) -> int:
        """All of its runs."""
        return self.rows * self.length

    @property
    def target_end(self) -> int:
        """Behind the last run in the target's part."""
        return self.target_start + (self.rows - 1) * self.target_stride + self.length

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Where each run begins in the target's part and in the source's, and its length."""
        target, source = self.target_start, self.source_start
        for _ in range(self.rows):
            yield target, source, self.length
            target += self.target_stride
            source += self.source_stride


class Block(NamedTuple):
    """Rows and columns of a tensor that a part has, and where: `offset` of the first, `stride` from row to row."""

    row: int
    row_end: int
    column: int
    column_end: int
    offset: int
    stride: int


@dataclass(frozen=True)
class ReallocationPlan:
    """What goes where. Ranks of source and target layout are processes, the same number being the same process."""

    transfers: tuple[Transfer, ...]
    """By the order of the tensors, then by target rank, then by place in the target."""
    source_processes: tuple[int, ...]
    """The process of each rank of the source layout."""
    target_processes: tuple[int, ...]

    def is_local(self, transfer: Transfer) -> bool:
        """Whether a transfer stays within a process."""
        return self.source_processes[transfer.source] == self.target_processes[transfer.target]

    @cached_property
    def sent(self) -> dict[int, int]:
        """Bytes that each process sends to others."""
        return self._sum(self.source_processes, "source")

    @cached_property
    def received(self) -> dict[int, int]:
        """Bytes that each process receives from others."""
        return self._sum(self.target_processes, "target")

    @property
    def moved(self) -> int:
        """Bytes that leave their process."""
        return sum(self.sent.values())

    @property
    def written(self) -> int:
        """Bytes of all targets."""
        return sum(transfer.bytes for transfer in self.transfers)

    def _sum(self, processes: Sequence[int], side: str) -> dict[int, int]:
        sums = dict.fromkeys(processes, 0)
        for transfer in self.transfers:
            if not self.is_local(transfer):
                sums[processes[getattr(transfer, side)]] += transfer.bytes
        return sums


def plan(
    tensors: Mapping[str, GlobalTensor],
    source: Division,
    target: Division,
    *,
    source_processes: Sequence[int] | None = None,
    target_processes: Sequence[int] | None = None,
) -> ReallocationPlan:
    """How every element of every target gets its value, exactly once.

    Where several ranks have the same part, a process that needs it itself takes its own, and what is left goes to
    whichever has least to send so far, large transfers first.

    Args:
        tensors: those to move, which both divisions know.
        source_processes: of each rank of the source layout; by default the rank.
        target_processes: of each rank of the target layout; by default the rank.

    Raises:
        ValueError: the source does not have all of a tensor exactly once, or the two cut it along two dimensions behind
            the first.
    """
    from_process = tuple(source_processes or range(source.layout.ranks))
    to_process = tuple(target_processes or range(target.layout.ranks))
    found: list[tuple[int, Transfer]] = []
    shared: list[tuple[int, Transfer, list[int]]] = []
    load: defaultdict[int, int] = defaultdict(int)
    for number, tensor in enumerate(tensors.values()):
        item = item_bytes(tensor.dtype)
        holders = replicas(tensor, source.parts(tensor.name))
        for target_rank, wanted in sorted(target.parts(tensor.name).items()):
            for part, ranks in holders.items():
                own = [rank for rank in ranks if from_process[rank] == to_process[target_rank]]
                for copy in common(part, wanted, item):
                    transfer = copy._replace(source=(own or ranks)[0], target=target_rank, tensor=tensor.name)
                    if own or len(ranks) == 1:
                        found.append((number, transfer))
                        load[from_process[ranks[0]]] += 0 if own else transfer.bytes
                    else:
                        shared.append((number, transfer, ranks))
    shared.sort(key=lambda each: (-each[1].bytes, each[0], each[1].target, each[1].target_start))
    for number, transfer, ranks in shared:
        chosen = min(ranks, key=lambda rank: (load[from_process[rank]], rank))
        load[from_process[chosen]] += transfer.bytes
        found.append((number, transfer._replace(source=chosen)))
    found.sort(key=lambda each: (each[0], each[1].target, each[1].target_start))
    return ReallocationPlan(tuple(transfer for _, transfer in found), from_process, to_process)


def replicas(tensor: GlobalTensor, parts: Mapping[int, LocalPart]) -> dict[LocalPart, list[int]]:
    """The distinct parts of a tensor that are not empty, each with the ranks that have it.

    Raises:
        ValueError: they are not all of the tensor, or overlap.
    """
    holders: dict[LocalPart, list[int]] = {}
    for rank, part in sorted(parts.items()):
        if part.elements:
            holders.setdefault(replace(part, shape=()), []).append(rank)
    distinct = list(holders)
    if sum(part.elements for part in distinct) != tensor.elements or _overlap(distinct):
        raise ValueError(f"the parts of {tensor.name} are not all of it exactly once: {distinct}")
    return holders


def _overlap(parts: Sequence[LocalPart]) -> bool:
    """Whether two parts have something in common."""
    groups: dict[tuple[int, int, int], list[LocalPart]] = {}
    for part in sorted(parts, key=lambda part: part.start):
        groups.setdefault((part.width, part.first, part.last), []).append(part)
    for group in groups.values():  # of the same columns: in order, none may begin before the end of the one before
        if any(before.end > after.start for before, after in itertools.pairwise(group)):
            return True
    return any(
        common(one, other, 1)
        for columns, others in itertools.combinations(groups, 2)
        if columns[0] != others[0] or max(columns[1], others[1]) < min(columns[2], others[2])
        for one in groups[columns]
        for other in groups[others]
    )


def item_bytes(dtype: str) -> int:
    """Bytes of one number of a safetensors format; formats that have a part of a byte are one, too."""
    return BYTES.get(dtype, 1)


@lru_cache(1 << 16)
def common(source: LocalPart, target: LocalPart, item: int) -> tuple[Transfer, ...]:
    """What two parts of a tensor have in common, by place in the target; ranks and name are left empty.

    Args:
        item: bytes of an element.
    """
    widths = {part.width for part in (source, target) if part.cut_by_columns} or {source.width}
    if len(widths) > 1:
        raise ValueError(f"a tensor is cut along two dimensions: {source}, {target}")
    width = widths.pop()
    found = []
    for one in blocks(source, width):
        for other in blocks(target, width):
            row, row_end = max(one.row, other.row), min(one.row_end, other.row_end)
            column, column_end = max(one.column, other.column), min(one.column_end, other.column_end)
            if row >= row_end or column >= column_end:
                continue
            starts = [each.offset + (row - each.row) * each.stride + column - each.column for each in (one, other)]
            rows, length = row_end - row, column_end - column
            if rows > 1 and length == one.stride == other.stride:
                rows, length = 1, rows * length
            numbers = (length, starts[0], one.stride, starts[1], other.stride)
            found.append(Transfer(0, 0, "", rows, *(item * number for number in numbers)))
    found.sort(key=lambda each: each.target_start)
    merged: list[Transfer] = []
    for each in found:
        before = merged[-1] if merged else None
        touches = (
            before is not None
            and before.rows == each.rows == 1
            and (
                (before.source_start + before.length, before.target_start + before.length)
                == (each.source_start, each.target_start)
            )
        )
        if before is not None and touches:
            merged[-1] = before._replace(length=before.length + each.length)
        else:
            merged.append(each)
    return tuple(each if each.rows > 1 else each._replace(source_stride=0, target_stride=0) for each in merged)


def blocks(part: LocalPart, width: int) -> Iterator[Block]:
    """A part as blocks of a tensor's rows of `width` elements, of which a part that is not cut by columns has any."""
    if not part.elements:
        return
    inner = part.last - part.first if part.cut_by_columns else width
    first = part.first if part.cut_by_columns else 0
    row, begin = divmod(part.start, inner)
    last_row, rest = divmod(part.end, inner)
    pieces = [(row, row + 1, begin, rest)] if row == last_row else []
    if row != last_row:
        pieces = [(row, row + 1, begin, inner)] if begin else []
        pieces += [(row + bool(begin), last_row, 0, inner), (last_row, last_row + 1, 0, rest)]
    for low, high, column, column_end in pieces:
        if low < high and column < column_end:
            yield Block(low, high, first + column, first + column_end, low * inner + column - part.start, inner)


def in_order(transfers: Sequence[Transfer]) -> Iterator[tuple[int, int, int, int]]:
    """The runs of several transfers to one target by place: number of the transfer, then as `Transfer.runs`."""
    if all(before.target_end <= after.target_start for before, after in itertools.pairwise(transfers)):
        for number, transfer in enumerate(transfers):
            for target, source, length in transfer.runs():
                yield number, target, source, length
        return
    for target, number, source, length in heapq.merge(*(_numbered(*each) for each in enumerate(transfers))):
        yield number, target, source, length


def _numbered(number: int, transfer: Transfer) -> Iterator[tuple[int, int, int, int]]:
    for target, source, length in transfer.runs():
        yield target, number, source, length
