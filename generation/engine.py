"""The interface of the engines: token ids in, token ids and their log-probabilities out.

Which engine runs is one config key; the records are the same.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from contracts.errors import UserError
from contracts.faults import Fault
from contracts.records import FinishReason, Sampling
from generation.config import GenerationConfig


class GenerationRequest(msgspec.Struct, frozen=True):
    """Ask for `n` answers to one prompt; answer number j is sampled with the seed `seed + j`."""

    prompt_ids: tuple[int, ...]
    n: int
    seed: int
    sampling: Sampling


class Answer(msgspec.Struct, frozen=True):
    """One sampled response."""

    response_ids: tuple[int, ...]
    """With the stop token at its end where `finish_reason` is "stop"."""
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    seed: int


class EngineSettings(msgspec.Struct, frozen=True):
    """What an engine needs beside the stage's config."""

    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    max_length: int
    """Tokens of the longest prompt plus the longest answer."""
    dtype: str
    """Number format of weights and activations: float32, bfloat16 or float16."""
    on_gpu: bool
    log: Path
    """Where a server writes what it has to say."""


class SamplingEngine(Protocol):
    """A loaded policy."""

    def generate(self, requests: Sequence[GenerationRequest], batch: str) -> Sequence[list[Answer] | Fault]:
        """Answer all requests, in their order, as one batch; a fault stands for a request that could not be answered.

        What other batches this engine has seen before makes no difference. `batch` is a name that no other batch of
        this engine has.
        """
        ...

    def close(self) -> None:
        """End what the engine started."""
        ...


def set_threads() -> str:
    """Give every engine all cores, unless the user has said how many; return the number. Call it before torch loads.

    Without OMP_NUM_THREADS, vLLM's throughput on a CPU falls to a fifth. The last bits of a CPU's results depend on
    it, so it must not depend on the number of replicas, which promises the same bytes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def devices_per_replica(config: GenerationConfig) -> int:
    """Accelerators that each replica gets; 0 on a machine without any.

    Raises:
        UserError: fewer accelerators than the configuration asks for.
    """
    import torch

    present = torch.cuda.device_count()
    wanted = config.tensor_parallel * max(config.replicas, config.servers)
    if present == 0 and config.tensor_parallel == 1:
        return 0
    if wanted > present:
        raise UserError(
            f"replicas (or servers) times tensor_parallel is {wanted}, but this machine shows {present} GPUs. "
            "Lower one of them, or check CUDA_VISIBLE_DEVICES."
        )
    return config.tensor_parallel
