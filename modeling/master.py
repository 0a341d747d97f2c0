"""Splits fp32 master weights into two halves: bfloat16 weights for inference, and the exact remainder to fp32.

    fp32      = sign exponent mantissa_hi | mantissa_lo             as an integer: x
    bf16      = (x + 2^15) >> 16                                    rounded to the nearest, ties away from zero
    remainder = (x + 2^15) mod 2^16                                 so that x = (bf16 << 16 | remainder) - 2^15

A bfloat16 checkpoint has the remainders in `master/`, which inference engines ignore. The next training joins both: at
the learning rates of preference learning an update is smaller than the last bit of a bfloat16 weight, and would be lost
in every iteration. A tensor without a remainder is exactly representable in bfloat16.
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
WEIGHTS_DIGEST = "weights"
"""Metadata entry of the remainder files: the `weights_digest` of the bfloat16 files that they complete."""


def split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Split an fp32 tensor into bfloat16 values and remainders (int16)."""
    bits = tensor.contiguous().flatten().view(torch.int32) + HALF
    remainder, upper = bits.view(torch.int16).view(-1, 2).T  # the lower half comes first
    return upper.contiguous().view(torch.bfloat16).view(tensor.shape), remainder.contiguous().view(tensor.shape)


def join(upper: Tensor, remainder: Tensor) -> Tensor:
    """Invert `split`."""
    bits = (upper.contiguous().view(torch.int16).int() << 16) | (remainder.int() & 0xFFFF)
    return (bits - HALF).view(torch.float32)


def has_remainder(remainder: Tensor) -> bool:
    """Whether any remainder is not zero, so that dropping it would lose precision."""
    return bool((remainder != -HALF).any())


def weights_digest(hashes: dict[str, str]) -> str:
    """A digest that identifies bfloat16 files, given as SHA-256 by name."""
    return digest(hashes)


class MasterWeights:
    """The fp32 weights that a training starts from, with the remainders if the model directory has them."""

    def __init__(self, model: Path) -> None:
        """Read the headers of a model directory.

        Raises:
            UserError: the remainders belong to other weights.
        """
        self.tensors: dict[str, StoredTensor] = stored_tensors(model)
        self._remainders: dict[str, Path] = {}
        files = sorted((model / MASTER).glob("*.safetensors"))
        wanted = (
            weights_digest(_hashes(model, sorted({tensor.file for tensor in self.tensors.values()}))) if files else ""
        )
        for file in files:
            with safe_open(file, "pt") as opened:
                if (opened.metadata() or {}).get(WEIGHTS_DIGEST) != wanted:
                    raise UserError(
                        f"{file} holds the remainders to fp32 of other weights than those in {model}: files of two "
                        f"checkpoints are mixed. Copy the whole directory again, or delete {model / MASTER} to train "
                        "from bfloat16."
                    )
                self._remainders.update(dict.fromkeys(opened.keys(), file))

    @property
    def has_remainders(self) -> bool:
        """Whether the checkpoint has remainders to fp32."""
        return bool(self._remainders)

    @property
    def precision(self) -> str:
        """float32 if the directory has the master weights of the last training, otherwise the format of its files."""
        formats = {tensor.dtype for tensor in self.tensors.values()}
        if self.has_remainders or formats == {"F32"}:
            return "float32"
        return "bfloat16" if "BF16" in formats else "float16" if "F16" in formats else "mixed"

    def read(self, name: str) -> Tensor:
        """A tensor in fp32; integer tensors unchanged."""
        beat()
        with safe_open(self.tensors[name].file, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if name in self._remainders:
            with safe_open(self._remainders[name], "pt") as file:
                return join(tensor, file.get_tensor(name))
        return tensor.float() if tensor.is_floating_point() else tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name."""
        for name in self.tensors:
            yield name, self.read(name)


def _hashes(model: Path, files: list[Path]) -> dict[str, str]:
    """SHA-256 of files by name; taken from the manifest if it lists them, which the stage verifies while it runs."""
    if (model / MANIFEST).is_file():
        known = {file.path: file.sha256 for file in Artifact.open(model).manifest.files}
        if all(file.name in known for file in files):
            return {file.name: known[file.name] for file in files}
    return {file.name: file_sha256(file) for file in files}
