"""What a stage of the native engine's pipeline computes of micro-batches."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contracts.attempt import beat
from modeling.packing import Packed
from training.engines.base import Outputs
from training.engines.sequence import Sequences


class Passed(nn.Module):
    """Stands for a layer of another stage."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class Received(nn.Module):
    """Stands for the embedding in stages behind the first: what the stage before has sent."""

    hidden: Tensor

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.hidden


class StageModule(nn.Module):
    """What one stage computes of the micro-batches in `batches`: hidden states, and the last one `finish`."""

    def __init__(
        self,
        module: Any,
        received: Received | None,
        last: bool,
        sequences: Sequences | None,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.module = module
        self.received = received
        self.last = last
        self.sequences = sequences
        self.dtype = dtype
        """Of the hidden states that travel between stages."""
        self.autocast = autocast
        self.batches: Sequence[Packed] = ()
        self.start = 0
        """Number of the first of them."""
        self.width = 0
        """Tokens that travel between stages: of the largest micro-batch, so that all have one shape."""
        self.finish: Callable[[Outputs, int], Tensor] = lambda outputs, number: torch.zeros(())

    def forward(self, *hidden: Tensor, number: Tensor | int) -> Tensor:
        """The hidden states of micro-batch `number`, [width, hidden size], in the first stage from its token ids.

        In the last stage what `finish` returns, a scalar.
        """
        beat()
        batch = self.batches[int(number) % len(self.batches)]
        part = batch if self.sequences is None else self.sequences.part(batch)
        tokens = part.input_ids.numel()
        if self.received is not None:
            self.received.hidden = hidden[0][:tokens].view(*part.input_ids.shape, -1)
        with self._casting(batch.input_ids.device):
            found = self.module.hidden(part)
            if self.last:
                whole = found if self.sequences is None else self.sequences.join(found, batch)
                return self.finish(self.module.read(whole, batch), self.start + int(number))
        return nn.functional.pad(found.to(self.dtype), (0, 0, 0, self.width - tokens))

    def tokens(self, batch: Packed) -> int:
        """Tokens of a micro-batch that this process computes."""
        return batch.input_ids.numel() if self.sequences is None else self.sequences.tokens(batch)

    def _casting(self, device: torch.device) -> Any:
        return torch.autocast(device.type, self.autocast) if self.autocast else contextlib.nullcontext()
