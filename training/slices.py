"""Reading a model's weights where they are used: each process its own slices, so that none holds the whole model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from contracts.attempt import beat
from contracts.models import ModelInfo
from modeling.loading import DTYPES
from modeling.master import Start, join
from reallocation.layouts import REMAINDER, LocalPart
from reallocation.planning import item_bytes
from reallocation.stored import StoredModel
from training.config import TrainingConfig
from training.parallel import HEADS, LLAMA_LIKE

PIECE = 1 << 20
"""Elements that are read at once."""


def reads_slices(config: TrainingConfig) -> bool:
    """Whether the processes of a training read their own slices instead of loading the whole model first.

    The native engine does, of the architectures that it divides; adapters need the layers that they are put into.
    """
    known = ModelInfo.read(config.model).architecture in {family + head for family in LLAMA_LIKE for head in HEADS}
    return config.parallel.is_native and config.parallel.processes > 1 and config.lora is None and known


class WeightSlices:
    """The weights of a model directory, with the remainders to fp32 where it has them."""

    def __init__(self, model: Path) -> None:
        """Read the headers.

        Raises:
            UserError: it is no model, or its remainders belong to other weights.
        """
        self._stored = StoredModel(model)
        self._exact = Start(model).has_rests

    def read(self, names: Sequence[str], part: LocalPart, into: Tensor) -> None:
        """Fill a process's part of a parameter, a piece after the other.

        Args:
            names: of the parameter in the trained module, where the model is called `model`; tied ones have several.
            part: what the process has of it.
            into: contiguous; in float32 it gets the master weights of the last training.

        Raises:
            RuntimeError: the files have no such tensor, which the check of the loaded model has let pass.
        """
        known = (name.removeprefix("model.") for name in names)
        found = next((name for name in known if name in self._stored.tensors), None)
        if found is None or into.numel() != part.elements or not into.is_contiguous():
            raise RuntimeError(f"{self._stored.path} has no {names[0]} to be read into {tuple(into.shape)}")
        rest = REMAINDER + found
        flat = into.detach().view(-1)
        for piece, start, end in _pieces(part):
            beat()
            value = self._piece(found, piece)
            if self._exact and rest in self._stored.tensors and into.dtype == torch.float32:
                value = join(value, self._piece(rest, piece))
            flat[start:end].copy_(value)

    def _piece(self, name: str, part: LocalPart) -> Tensor:
        dtype = self._stored.tensors[name].dtype
        content = bytearray(part.elements * item_bytes(dtype))
        self._stored.read(name, part, memoryview(content))
        return torch.frombuffer(content, dtype=DTYPES[dtype])


def _pieces(part: LocalPart) -> Iterator[tuple[LocalPart, int, int]]:
    """A part in pieces, and where each begins and ends in it."""
    for start in range(0, part.elements, PIECE):
        end = min(start + PIECE, part.elements)
        yield replace(part, shape=(end - start,), start=part.start + start, end=part.start + end), start, end
