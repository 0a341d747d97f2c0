"""Moves parameters between processes into another layout, by torch.distributed: gloo on CPUs, NCCL on GPUs.

Every process computes the same plan and the same rounds. In a round a process sends and receives at most half a
bucket, in one message to and from each other process. While the messages of a round are in flight, those of the
previous round are copied to their destinations, so two rounds (one bucket) are in memory in addition to the parts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reallocation.layouts import LocalPart
from reallocation.planning import ReallocationPlan, Transfer

BUCKET = 256 << 20
"""The most bytes of messages that a process holds at a time."""
ALIGNED = 16
"""Transfers begin at multiples of this in a message, so that they can be viewed as any dtype."""

Message = list[Transfer]
Round = dict[tuple[int, int], Message]
"""Messages by (sending process, receiving process)."""


@dataclass(frozen=True)
class TransferStats:
    """The traffic of one process during `reallocate`."""

    sent: int
    """Bytes sent."""
    received: int
    rounds: int
    staged: int
    """The most bytes of messages that the process held at the same time."""


def reallocate(
    plan: ReallocationPlan,
    sources: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    bucket: int = BUCKET,
    group: Any = None,
) -> TransferStats:
    """Fill this process's parts of the target layout from the parts that all processes have in the source layout.

    A collective: every process of the group calls it with the same plan. Processes of the plan are ranks of the group.

    Args:
        plan: assigns each process at most one rank of each layout.
        sources: this process's part of each tensor, contiguous, of shape `LocalPart.shape`; empty if it has no rank.
        targets: its parts to fill, contiguous and of the same dtypes; they must not share memory with `sources`.
        bucket: the most bytes of messages that this process holds at a time.

    Raises:
        ValueError: a process has two ranks of a layout, a part is not contiguous, or the bucket is too small for any
            message.
    """
    for ranks in (plan.source_processes, plan.target_processes):
        if len(set(ranks)) != len(ranks):
            raise ValueError(f"a process has several ranks of a layout: {ranks}")
    process = dist.get_rank(group)
    sent = received = staged = 0
    waiting: _RoundInFlight | None = None
    done = rounds_of(plan, bucket)
    for messages in done:
        posted = _RoundInFlight(messages, process, sources, targets, group)
        sent, received = sent + posted.sent, received + posted.received
        staged = max(staged, posted.staged + (waiting.staged if waiting else 0))
        if waiting is not None:
            waiting.finish()
        waiting = posted
    for transfer in plan.transfers:
        if plan.is_local(transfer) and plan.target_processes[transfer.target] == process:
            name = transfer.tensor
            _target_view(transfer, targets[name]).copy_(_source_view(transfer, sources[name]))
    if waiting is not None:
        waiting.finish()
    return TransferStats(sent, received, len(done), staged)


def rounds_of(plan: ReallocationPlan, bucket: int) -> list[Round]:
    """The messages of each round, the same in every process.

    All pairs of processes make progress at the same rate, so that none waits for others; a transfer that is too large
    for a round is divided.
    """
    room = bucket // 2 - bucket // 2 % ALIGNED
    if room < ALIGNED:
        raise ValueError(f"a bucket of {bucket} bytes holds no message")
    pairs: defaultdict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for transfer in plan.transfers:
        if not plan.is_local(transfer):
            pairs[plan.source_processes[transfer.source], plan.target_processes[transfer.target]].append(transfer)
    ordered: list[tuple[float, tuple[int, int], Transfer]] = []
    for pair, transfers in pairs.items():
        total, before = sum(transfer.bytes for transfer in transfers), 0
        for transfer in transfers:
            for piece in pieces(transfer, room):
                ordered.append((before / total, pair, piece))
                before += piece.bytes
    ordered.sort(key=lambda each: each[:2])
    rounds: list[Round] = []
    used: defaultdict[int, int] = defaultdict(int)
    for _, pair, piece in ordered:
        size = _padded(piece.bytes)
        if not rounds or any(used[process] + size > room for process in pair):
            rounds.append(defaultdict(list))
            used.clear()
        rounds[-1][pair].append(piece)
        for process in pair:
            used[process] += size
    return rounds


def pieces(transfer: Transfer, most: int) -> Iterator[Transfer]:
    """Divide a transfer into pieces of at most `most` bytes, a multiple of `ALIGNED`."""
    if transfer.length > most:
        for row in range(transfer.rows):
            source = transfer.source_start + row * transfer.source_stride
            target = transfer.target_start + row * transfer.target_stride
            for start in range(0, transfer.length, most):
                length = min(most, transfer.length - start)
                numbers = (source + start, 0, target + start, 0)
                yield Transfer(*transfer[:3], 1, length, *numbers)
        return
    several = most // transfer.length
    for row in range(0, transfer.rows, several):
        yield transfer._replace(
            rows=min(several, transfer.rows - row),
            source_start=transfer.source_start + row * transfer.source_stride,
            target_start=transfer.target_start + row * transfer.target_stride,
        )


class _RoundInFlight:
    """The messages of one round that are in flight to and from this process."""

    def __init__(
        self,
        messages: Round,
        process: int,
        sources: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        group: Any,
    ) -> None:
        self._targets = targets
        self._incoming: list[tuple[Message, Tensor]] = []
        self._outgoing: list[Tensor] = []  # keeps the buffers alive until they are sent
        self.sent = self.received = self.staged = 0
        operations = []
        for (sender, receiver), message in sorted(messages.items()):
            if process not in (sender, receiver):
                continue
            some = next(iter((sources if sender == process else targets).values()))
            size = sum(_padded(transfer.bytes) for transfer in message)
            buffer = torch.empty(size, dtype=torch.uint8, device=some.device)
            self.staged += size
            if sender == process:
                for transfer, offset in _offsets(message):
                    own = _source_view(transfer, sources[transfer.tensor])
                    buffer[offset : offset + transfer.bytes].view(own.dtype).view(own.shape).copy_(own)
                    self.sent += transfer.bytes
                self._outgoing.append(buffer)
                operations.append(dist.P2POp(dist.isend, buffer, group=group, group_peer=receiver))
            else:
                self.received += sum(transfer.bytes for transfer in message)
                self._incoming.append((message, buffer))
                operations.append(dist.P2POp(dist.irecv, buffer, group=group, group_peer=sender))
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def finish(self) -> None:
        """Wait for the messages, and copy the received ones into the target parts."""
        for work in self._works:
            work.wait()
        for message, buffer in self._incoming:
            for transfer, offset in _offsets(message):
                own = _target_view(transfer, self._targets[transfer.tensor])
                own.copy_(buffer[offset : offset + transfer.bytes].view(own.dtype).view(own.shape))
        self._incoming.clear()
        self._outgoing.clear()


def _offsets(message: Message) -> Iterator[tuple[Transfer, int]]:
    offset = 0
    for transfer in message:
        yield transfer, offset
        offset += _padded(transfer.bytes)


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _source_view(transfer: Transfer, tensor: Tensor) -> Tensor:
    """A view of a transfer's elements in the source's part, [rows, length]."""
    return _view(tensor, transfer, transfer.source_start, transfer.source_stride)


def _target_view(transfer: Transfer, tensor: Tensor) -> Tensor:
    """A view of a transfer's elements in the target's part, [rows, length]."""
    return _view(tensor, transfer, transfer.target_start, transfer.target_stride)


def _view(tensor: Tensor, transfer: Transfer, start: int, stride: int) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"the part of {transfer.tensor} is not contiguous")
    item = tensor.element_size()
    flat = tensor.detach().view(-1)
    return flat.as_strided(
        (transfer.rows, transfer.length // item), (stride // item, 1), flat.storage_offset() + start // item
    )


def slice_of(whole: Tensor, part: LocalPart) -> Tensor:
    """Copy a part out of an undivided tensor, by the definition of `LocalPart`."""
    if not part.elements:
        return whole.new_empty(part.shape)
    columns = whole.reshape(-1, part.width)[:, part.first : part.last]
    return columns.reshape(-1)[part.start : part.end].reshape(part.shape).clone()
