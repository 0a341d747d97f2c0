"""Plans which bytes go from which rank to which, between any two layouts. Pure and deterministic.

A part of a tensor consists of at most three blocks of rows (`LocalPart`: an incomplete first row, an incomplete last
row, and the rows between them), and so does the intersection of two parts. Each block of the intersection is one
transfer: runs of bytes of equal length and stride in source and target. Runs that are adjacent in both are merged.
"""

import bisect
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
    """Bytes of one tensor that one rank receives from another: `rows` runs of `length` bytes.

    Run i begins at byte start + i · stride, in the source's part and in the target's part of the tensor.
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
        """The bytes of all runs."""
        return self.rows * self.length

    @property
    def target_end(self) -> int:
        """The end of the last run in the target's part."""
        return self.target_start + (self.rows - 1) * self.target_stride + self.length

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield the start of each run in the target's part, its start in the source's part, and its length."""
        target, source = self.target_start, self.source_start
        for _ in range(self.rows):
            yield target, source, self.length
            target += self.target_stride
            source += self.source_stride


class Block(NamedTuple):
    """A rectangle of a tensor's rows and columns within a part: its first element is at `offset`, with `stride` from
    row to row."""

    row: int
    row_end: int
    column: int
    column_end: int
    offset: int
    stride: int


@dataclass(frozen=True)
class ReallocationPlan:
    """The transfers from a source layout to a target layout. Each rank belongs to a process, and a process may have
    ranks of both layouts."""

    transfers: tuple[Transfer, ...]
    """Ordered by tensor, then by target rank, then by position in the target."""
    source_processes: tuple[int, ...]
    """The process of each rank of the source layout."""
    target_processes: tuple[int, ...]

    def is_local(self, transfer: Transfer) -> bool:
        """Whether a transfer stays within a process."""
        return self.source_processes[transfer.source] == self.target_processes[transfer.target]

    @cached_property
    def sent(self) -> dict[int, int]:
        """The bytes that each process sends to others."""
        return self._sum(self.source_processes, "source")

    @cached_property
    def received(self) -> dict[int, int]:
        """The bytes that each process receives from others."""
        return self._sum(self.target_processes, "target")

    @property
    def moved(self) -> int:
        """The bytes sent between processes."""
        return sum(self.sent.values())

    @property
    def written(self) -> int:
        """The bytes of all target parts."""
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
    """Plan the transfers that fill every element of every target part exactly once.

    If several ranks have the same source part, a process uses its own copy if it has one. All other transfers are
    assigned, the largest first, to the process that has the least to send so far.

    Args:
        tensors: the tensors to move, known to both divisions.
        source_processes: the process of each rank of the source layout; by default the rank.
        target_processes: the process of each rank of the target layout; by default the rank.

    Raises:
        ValueError: the distinct source parts do not cover a tensor exactly once, or the two layouts cut it along two
            different dimensions other than the first.
    """
    from_process = tuple(source_processes or range(source.layout.ranks))
    to_process = tuple(target_processes or range(target.layout.ranks))
    assigned: list[tuple[int, Transfer]] = []
    shared: list[tuple[int, Transfer, list[tuple[int, int]]]] = []
    queues: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    load: defaultdict[int, int] = defaultdict(int)
    for number, tensor in enumerate(tensors.values()):
        item = item_bytes(tensor.dtype)
        holders = replicas(tensor, source.parts(tensor.name))
        parts, ranks_of = PartIndex(list(holders)), list(holders.values())
        queue_of = [queues.setdefault(tuple(ranks), [(0, rank) for rank in ranks]) for ranks in ranks_of]
        own_of = [{from_process[rank]: rank for rank in reversed(ranks)} for ranks in ranks_of]
        for target_rank, wanted in target.parts(tensor.name).items():
            for held in parts.candidates(wanted):
                ranks, own = ranks_of[held], own_of[held].get(to_process[target_rank])
                for copy in intersection(parts.parts[held], wanted, item):
                    transfer = copy._replace(
                        source=ranks[0] if own is None else own, target=target_rank, tensor=tensor.name
                    )
                    if own is not None or len(ranks) == 1:
                        assigned.append((number, transfer))
                        load[from_process[ranks[0]]] += transfer.bytes if own is None else 0
                    else:
                        shared.append((number, transfer, queue_of[held]))
    shared.sort(key=lambda each: (-each[1].bytes, each[0], each[1].target, each[1].target_start))
    for number, transfer, queue in shared:
        chosen = _least_loaded(queue, from_process, load)
        load[from_process[chosen]] += transfer.bytes
        assigned.append((number, transfer._replace(source=chosen)))
    assigned.sort(key=lambda each: (each[0], each[1].target, each[1].target_start))
    return ReallocationPlan(tuple(transfer for _, transfer in assigned), from_process, to_process)


def _least_loaded(queue: list[tuple[int, int]], processes: Sequence[int], load: Mapping[int, int]) -> int:
    """The rank in a heap of (load, rank) whose process has the least to send, the lowest rank among equals. Loads only
    grow, so an entry is never too high, and only the first one has to be updated until it is current."""
    while queue[0][0] != load[processes[queue[0][1]]]:
        rank = queue[0][1]
        heapq.heapreplace(queue, (load[processes[rank]], rank))
    return queue[0][1]


class PartIndex:
    """An index of the distinct parts of a tensor in one layout, for fast search by position.

    Parts are grouped by their columns, and sorted by their rows within a group.
    """

    def __init__(self, parts: Sequence[LocalPart]) -> None:
        """Sort the parts; they must not overlap, and none may be empty (`replicas`)."""
        self.parts = parts
        groups: dict[tuple[int, int, int], list[int]] = {}
        for number in sorted(range(len(parts)), key=lambda each: parts[each].start):
            part = parts[number]
            groups.setdefault((part.width, part.first, part.last), []).append(number)
        self._groups = [groups[columns] for columns in sorted(groups)]
        self._columns = sorted(groups)
        self._spans = [[_global_range(parts[number]) for number in group] for group in self._groups]

    def candidates(self, wanted: LocalPart) -> Iterator[int]:
        """Yield the indices of all parts that intersect a part of another layout, and of few others: some that are near
        its incomplete first or last row without intersecting it.

        Raises:
            ValueError: the layouts cut the tensor along two dimensions.
        """
        if not wanted.elements or not self.parts:
            return
        low, high = _global_range(wanted)
        groups = range(len(self._groups))
        some = self.parts[0]
        if some.cut_by_columns:
            if wanted.cut_by_columns and wanted.width != some.width:
                raise ValueError(f"a tensor is cut along two dimensions: {some}, {wanted}")
            first, last = (wanted.first, wanted.last) if wanted.cut_by_columns else (0, some.width)
            if low // some.width == (high - 1) // some.width:  # it lies within one row
                first, last = low % some.width, (high - 1) % some.width + 1
            begin = bisect.bisect_right(self._columns, first, key=lambda each: each[2])
            groups = range(begin, bisect.bisect_left(self._columns, last, key=lambda each: each[1]))
        for group in groups:
            spans = self._spans[group]
            begin = bisect.bisect_right(spans, low, key=lambda each: each[1])
            yield from self._groups[group][begin : bisect.bisect_left(spans, high, key=lambda each: each[0])]


def _global_range(part: LocalPart) -> tuple[int, int]:
    """The position of a part's first element in the flattened tensor, and that of its last element plus one."""
    inner = part.last - part.first
    first, last = (each // inner * part.width + part.first + each % inner for each in (part.start, part.end - 1))
    return first, last + 1


def replicas(tensor: GlobalTensor, parts: Mapping[int, LocalPart]) -> dict[LocalPart, list[int]]:
    """The distinct non-empty parts of a tensor, each with the ranks that have it.

    Raises:
        ValueError: the parts overlap, or do not cover the tensor.
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
    """Whether two parts intersect, or have column ranges that overlap without being equal, which no layout produces."""
    groups: dict[tuple[int, int, int], list[LocalPart]] = {}
    for part in sorted(parts, key=lambda part: part.start):
        groups.setdefault((part.width, part.first, part.last), []).append(part)
    columns = sorted(groups)
    return any(before[0] != after[0] or before[2] > after[1] for before, after in itertools.pairwise(columns)) or any(
        before.end > after.start for group in groups.values() for before, after in itertools.pairwise(group)
    )


def item_bytes(dtype: str) -> int:
    """The bytes per element of a safetensors dtype; 1 for dtypes that are unknown or smaller than a byte."""
    return BYTES.get(dtype, 1)


@lru_cache(1 << 16)
def intersection(source: LocalPart, target: LocalPart, item: int) -> tuple[Transfer, ...]:
    """The intersection of two parts of a tensor as transfers, by position in the target; ranks and name are left empty.

    Args:
        item: bytes per element.
    """
    widths = {part.width for part in (source, target) if part.cut_by_columns} or {source.width}
    if len(widths) > 1:
        raise ValueError(f"a tensor is cut along two dimensions: {source}, {target}")
    width = widths.pop()
    transfers = []
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
            transfers.append(Transfer(0, 0, "", rows, *(item * number for number in numbers)))
    transfers.sort(key=lambda each: each.target_start)
    merged: list[Transfer] = []
    for each in transfers:
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
    """Divide a part into blocks of rows of `width` elements; for a part that is not cut by columns, any width works."""
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


def interleaved(transfers: Sequence[Transfer]) -> Iterator[list[Transfer]]:
    """Group transfers to one target such that writing the groups one after the other, and in each row of a group one
    run of every transfer, writes the target sequentially. Transfers that cannot be grouped so become groups of one
    run."""
    group: list[Transfer] = []
    end = 0
    for transfer in sorted(transfers, key=lambda each: each.target_start):
        if group and transfer.target_start >= end:
            yield from [group] if _interleaves(group) else _single_runs(group)
            group = []
        group.append(transfer)
        end = max(end, transfer.target_end)
    if group:
        yield from [group] if _interleaves(group) else _single_runs(group)


def _interleaves(group: Sequence[Transfer]) -> bool:
    first = group[0]
    ends = [each.target_start + each.length for each in group]
    if first.rows == 1:
        return len(group) == 1
    return (
        all((each.rows, each.target_stride) == (first.rows, first.target_stride) for each in group)
        and ends[:-1] == [each.target_start for each in group[1:]]
        and ends[-1] == first.target_start + first.target_stride
    )


def _single_runs(group: Sequence[Transfer]) -> Iterator[list[Transfer]]:
    for target, number, source, length in heapq.merge(*(_numbered_runs(*each) for each in enumerate(group))):
        yield [group[number]._replace(rows=1, length=length, source_start=source, target_start=target)]


def runs_in_order(transfers: Sequence[Transfer]) -> Iterator[tuple[int, int, int, int]]:
    """Yield the runs of several transfers to one target by position: `Transfer.source`, then as in `Transfer.runs`."""
    for group in interleaved(transfers):
        for runs in zip(*(transfer.runs() for transfer in group), strict=True):
            for transfer, (target, source, length) in zip(group, runs, strict=True):
                yield transfer.source, target, source, length


def _numbered_runs(number: int, transfer: Transfer) -> Iterator[tuple[int, int, int, int]]:
    for target, source, length in transfer.runs():
        yield target, number, source, length
