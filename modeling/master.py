"""fp32 weights in two halves: bfloat16 for whoever computes with it, and what is missing to fp32, bit by bit.

    fp32   = sign exponent mantissa_hi | mantissa_lo             as an integer: x
    bf16   = (x + 2^15) >> 16                                    rounded to the nearest, ties away from zero
    rest   = (x + 2^15) mod 2^16                                 so that x = (bf16 << 16 | rest) - 2^15

A checkpoint in bfloat16 has the rests beside it, in `master/`, where engines do not look. The next training joins both:
at the learning rates of preference learning an update is smaller than the last bit of a bfloat16 weight, and would be
lost at every hand-off. A tensor without a rest is a bfloat16 number exactly.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from contracts.artifacts import Artifact
from contracts.attempt import beat
from contracts.errors import UserError
from contracts.fingerprint import digest, file_sha256
from contracts.manifest import MANIFEST
from contracts.models import MASTER
from contracts.weights import StoredTensor, stored_tensors

HALF = 1 << 15
BELONGS_TO = "weights"
"""Entry of the files' metadata: `belonging` of the bfloat16 files that they are the rests of."""


def split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor in fp32 as bfloat16 numbers and their rests (int16)."""
    bits = tensor.contiguous().flatten().view(torch.int32) + HALF
    rest, upper = bits.view(torch.int16).view(-1, 2).T  # the lower half comes first
    return upper.contiguous().view(torch.bfloat16).view(tensor.shape), rest.contiguous().view(tensor.shape)


def join(upper: Tensor, rest: Tensor) -> Tensor:
    """The opposite of `split`."""
    bits = (upper.contiguous().view(torch.int16).int() << 16) | (rest.int() & 0xFFFF)
    return (bits - HALF).view(torch.float32)


def has_rest(rest: Tensor) -> bool:
    """Whether anything is lost without it."""
    return bool((rest != -HALF).any())


def belonging(hashes: dict[str, str]) -> str:
    """What the rests say of the files (SHA-256 by name) that they belong to."""
    return digest(hashes)


class Start:
    """The weights that a training begins with, in fp32, as exactly as its model directory has them."""

    def __init__(self, model: Path) -> None:
        """Look at the headers.

        Raises:
            UserError: the rests are of other weights.
        """
        self.tensors: dict[str, StoredTensor] = stored_tensors(model)
        self._rests: dict[str, Path] = {}
        files = sorted((model / MASTER).glob("*.safetensors"))
        wanted = belonging(_hashes(model, sorted({tensor.file for tensor in self.tensors.values()}))) if files else ""
        for file in files:
            with safe_open(file, "pt") as opened:
                if (opened.metadata() or {}).get(BELONGS_TO) != wanted:
                    raise UserError(
                        f"{file} holds what is missing to the fp32 of other weights than those of {model}: files of "
                        f"two checkpoints are mixed. Copy the whole directory again, or delete {model / MASTER}, and "
                        "training starts from bfloat16."
                    )
                self._rests.update(dict.fromkeys(opened.keys(), file))

    @property
    def has_rests(self) -> bool:
        """Whether the files hold more than the engines see."""
        return bool(self._rests)

    @property
    def precision(self) -> str:
        """float32 where that is what the last training ended with, else the format of the files."""
        formats = {tensor.dtype for tensor in self.tensors.values()}
        if self.has_rests or formats == {"F32"}:
            return "float32"
        return "bfloat16" if "BF16" in formats else "float16" if "F16" in formats else "mixed"

    def read(self, name: str) -> Tensor:
        """A tensor in fp32; one that is no number with a point as it is."""
        beat()
        with safe_open(self.tensors[name].file, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if name in self._rests:
            with safe_open(self._rests[name], "pt") as file:
                return join(tensor, file.get_tensor(name))
        return tensor.float() if tensor.is_floating_point() else tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """All of them."""
        for name in self.tensors:
            yield name, self.read(name)


def _hashes(model: Path, files: list[Path]) -> dict[str, str]:
    """Of files that a manifest lists, by it: the stage compares it with them while it works."""
    if (model / MANIFEST).is_file():
        known = {file.path: file.sha256 for file in Artifact.open(model).manifest.files}
        if all(file.name in known for file in files):
            return {file.name: known[file.name] for file in files}
    return {file.name: file_sha256(file) for file in files}
