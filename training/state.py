"""Saves the training state, from which a stopped or killed training resumes: weights, moments and log in one file.

The file holds unsharded fp32 tensors by parameter name, so a training may resume with another number of processes or
another ZeRO stage. It is replaced atomically: a crash leaves either the new file or the previous one. The loop draws no
random numbers that depend on its past, so with the same layout a resumed training equals an uninterrupted one, bit for
bit if the kernels are deterministic. safetensors and JSON only: no pickle is ever read.
"""

import errno
import itertools
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from contracts.attempt import beat
from contracts.errors import UserError
from modeling.loading import Shapes
from training.engines.base import TrainingEngine

WEIGHTS = "weights"
LOG = "log"
"""Name of the tensor with the log as JSON, which may become longer than a safetensors header."""
CHECKSUM = "crc32"
"""Name of the tensor with the file's last four bytes: the checksum of everything before them."""
CHUNK = 16 << 20

Line = dict[str, float | int]


class TrainingState:
    """The saved state of one training. Every process calls the methods at the same steps; rank 0 writes the file."""

    def __init__(self, path: Path, engine: TrainingEngine, *, moments: tuple[str, ...], seconds: float) -> None:
        """Prepare to save the state of `engine`; does not read or write anything yet.

        Args:
            path: the file, in the stage's hidden directory, which belongs to this configuration alone.
            engine: holds model and optimizer, after `prepare`.
            moments: names of the optimizer's moments.
            seconds: maximum age of the saved state.
        """
        self.path = path
        self.resumed_steps = 0
        self._engine = engine
        self._names = list(engine.trained_shapes())
        self._state_names = (WEIGHTS, *moments)
        self._seconds = seconds
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to save, by the clock of rank 0; False in the other processes."""
        return self._engine.is_main and time.monotonic() - self._saved >= self._seconds

    def save(self, log: list[Line]) -> None:
        """Replace the saved state by the current one, after the steps of `log`.

        Raises:
            OSError: there is no room for it; the previous one is kept.
        """
        if self._engine.is_main:
            _write(self.path, self._shapes(), self._tensors(), json.dumps(log).encode())
        else:
            for _ in self._tensors():  # the main process gathers from this one
                beat()
        self._saved = time.monotonic()

    def read(self) -> list[Line]:
        """Read the log of the saved state; empty if there is no state, or if it is damaged.

        Raises:
            UserError: it is the state of another model.
        """
        log: list[Line] = []
        if self.path.is_file():
            if _is_whole(self.path):
                log = self._read_log()
            elif self._engine.is_main:
                print(f"{self.path} is damaged; the training starts from its beginning.", file=sys.stderr)
        agreed = self._engine.all_reduce_metrics({"readers": float(bool(log))})
        return log if agreed["readers"] == self._engine.replicas else []

    def restore(self, log: list[Line]) -> None:
        """Load the saved state into model and optimizer; `log` is the result of `read`."""
        with safe_open(self.path, "pt") as file:
            for name in self._names:
                beat()
                # Copies: mapped tensors would keep the file's blocks on disk after it has been replaced.
                tensors = {
                    state_name: file.get_tensor(f"{state_name}/{name}").clone() for state_name in self._state_names
                }
                self._engine.write(name, tensors, len(log))
        self.resumed_steps = len(log)

    def _read_log(self) -> list[Line]:
        with safe_open(self.path, "pt") as file:
            names = set(file.keys()) - {LOG, CHECKSUM}
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            log: list[Line] = json.loads(file.get_tensor(LOG).numpy().tobytes())
        expected = self._shapes()
        if found != expected:
            wrong = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            raise UserError(
                f"{self.path} is the saved state of another model: its {wrong} has shape {found.get(wrong)} instead of "
                f"{expected.get(wrong)}. Remove it, and the training starts from its beginning."
            )
        return log

    def _shapes(self) -> Shapes:
        shapes = self._engine.trained_shapes()
        return {f"{state_name}/{name}": shape for name, shape in shapes.items() for state_name in self._state_names}

    def _tensors(self) -> Iterator[Tensor]:
        """Gather the unsharded tensors one by one, in the order of `_shapes`."""
        for name in self._names:
            yield from self._engine.read(name, self._state_names)


def _write(path: Path, shapes: Shapes, tensors: Iterable[Tensor], log: bytes) -> None:
    """Write fp32 tensors of these shapes as a safetensors file, one tensor at a time to save memory."""
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in {**shapes, LOG: (len(log),), CHECKSUM: (4,)}.items():
        dtype, width = ("F32", 4) if name in shapes else ("U8", 1)
        start, end = end, end + width * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    size = len(header).to_bytes(8, "little")
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.unlink(missing_ok=True)
    if shutil.disk_usage(path.parent).free < len(header) + end:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    try:
        with scratch.open("wb") as file:
            checksum = 0
            for data in itertools.chain([size, header], map(_numbers, tensors), [log]):
                checksum = zlib.crc32(data, checksum)
                file.write(data)
                beat()
            file.write(checksum.to_bytes(4, "little"))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    os.replace(scratch, path)


def _numbers(tensor: Tensor) -> Any:
    """A tensor's fp32 values on the CPU, as an array that a file can write."""
    return tensor.detach().to("cpu", torch.float32).contiguous().flatten().numpy()


def _is_whole(path: Path) -> bool:
    """Whether a file ends with the checksum of everything before it."""
    left, checksum = path.stat().st_size - 4, 0
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(left, CHUNK))):
            checksum = zlib.crc32(data, checksum)
            left -= len(data)
            beat()
        return left == 0 and file.read() == checksum.to_bytes(4, "little")
