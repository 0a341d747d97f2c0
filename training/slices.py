"""Reads only a process's own slices of a model's weights, so that no process holds the whole model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from contracts.attempt import beat
from contracts.models import ModelInfo
from modeling.loading import DTYPES
from modeling.master import MasterWeights, join
from reallocation.layouts import REMAINDER, LocalPart
from reallocation.planning import item_bytes
from reallocation.stored import StoredModel
from training.config import TrainingConfig
from training.parallel import HEADS, LLAMA_LIKE

PIECE = 1 << 20
"""Maximum number of elements to read at once."""


def reads_slices(config: TrainingConfig) -> bool:
    """Whether each process of a training reads only its own slices, instead of loading the whole model first.

    It does with the native engine and the architectures that this engine can shard, unless there are adapters, which
    are inserted into loaded layers.
    """
    known = ModelInfo.read(config.model).architecture in {family + head for family in LLAMA_LIKE for head in HEADS}
    return config.parallel.is_native and config.parallel.processes > 1 and config.lora is None and known


class WeightSlices:
    """The weights of a model directory, with their remainders to fp32 if it has them."""

    def __init__(self, model: Path) -> None:
        """Read the headers.

        Raises:
            UserError: it is not a model, or its remainders belong to other weights.
        """
        self._stored = StoredModel(model)
        self._exact = MasterWeights(model).has_remainders

    def read(self, names: Sequence[str], part: LocalPart, into: Tensor) -> None:
        """Fill a process's shard of a parameter, piece by piece.

        Args:
            names: names of the parameter in the trained module, with the prefix `model.`; tied ones have several.
            part: the process's shard.
            into: contiguous tensor to fill; one in float32 gets the previous training's master weights.

        Raises:
            RuntimeError: the files have no such tensor, although the model passed `check_weights`.
        """
        known = (name.removeprefix("model.") for name in names)
        found = next((name for name in known if name in self._stored.tensors), None)
        if found is None or into.numel() != part.elements or not into.is_contiguous():
            raise RuntimeError(f"{self._stored.path} has no {names[0]} to be read into {tuple(into.shape)}")
        remainder = REMAINDER + found
        flat = into.detach().view(-1)
        for piece, start, end in _pieces(part):
            beat()
            value = self._piece(found, piece)
            if self._exact and remainder in self._stored.tensors and into.dtype == torch.float32:
                value = join(value, self._piece(remainder, piece))
            flat[start:end].copy_(value)

    def _piece(self, name: str, part: LocalPart) -> Tensor:
        dtype = self._stored.tensors[name].dtype
        content = bytearray(part.elements * item_bytes(dtype))
        self._stored.read(name, part, memoryview(content))
        return torch.frombuffer(content, dtype=DTYPES[dtype])


def _pieces(part: LocalPart) -> Iterator[tuple[LocalPart, int, int]]:
    """Split a shard into pieces of at most PIECE elements, each with its start and end in the shard."""
    for start in range(0, part.elements, PIECE):
        end = min(start + PIECE, part.elements)
        yield replace(part, shape=(end - start,), start=part.start + start, end=part.start + end), start, end
