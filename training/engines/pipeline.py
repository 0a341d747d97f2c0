"""The module that a pipeline stage of the native engine runs on micro-batches."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contracts.attempt import beat
from modeling.packing import Packed
from training.engines.base import Outputs
from training.engines.sequence import SequenceParallelGroup


class SkippedLayer(nn.Module):
    """Placeholder for a layer of another stage."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class ReceivedHiddenStates(nn.Module):
    """Placeholder for the embedding in all stages but the first: returns the previous stage's hidden states."""

    hidden: Tensor

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.hidden


class StageModule(nn.Module):
    """Runs one stage's layers on the micro-batches in `batches`; the last stage also applies the head and `finish`."""

    def __init__(
        self,
        module: Any,
        received: ReceivedHiddenStates | None,
        last: bool,
        sequence_group: SequenceParallelGroup | None,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.module = module
        self.received = received
        self.last = last
        self.sequence_group = sequence_group
        self.dtype = dtype
        """Number format of the hidden states that are sent between stages."""
        self.autocast = autocast
        self.batches: Sequence[Packed] = ()
        self.start = 0
        """Number of the first micro-batch in `batches`."""
        self.width = 0
        """Tokens of the largest micro-batch, to which hidden states are padded so that all are sent in one shape."""
        self.finish: Callable[[Outputs, int], Tensor] = lambda outputs, number: torch.zeros(())

    def forward(self, *hidden: Tensor, number: Tensor | int) -> Tensor:
        """The hidden states of micro-batch `number` after this stage, [width, hidden size].

        Computed from the previous stage's `hidden`, in the first stage from token ids. The last stage returns the
        scalar of `finish` instead.
        """
        beat()
        batch = self.batches[int(number) % len(self.batches)]
        part = batch if self.sequence_group is None else self.sequence_group.shard(batch)
        tokens = part.input_ids.numel()
        if self.received is not None:
            self.received.hidden = hidden[0][:tokens].view(*part.input_ids.shape, -1)
        with self._casting(batch.input_ids.device):
            found = self.module.hidden(part)
            if self.last:
                whole = found if self.sequence_group is None else self.sequence_group.gather(found, batch)
                return self.finish(self.module.read(whole, batch), self.start + int(number))
        return nn.functional.pad(found.to(self.dtype), (0, 0, 0, self.width - tokens))

    def token_count(self, batch: Packed) -> int:
        """Number of a micro-batch's tokens that this process computes."""
        return batch.input_ids.numel() if self.sequence_group is None else self.sequence_group.token_count(batch)

    def _casting(self, device: torch.device) -> Any:
        return torch.autocast(device.type, self.autocast) if self.autocast else contextlib.nullcontext()
