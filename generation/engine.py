"""The interface of sampling engines: token ids in, token ids and their log-probabilities out.

The config key `engine` selects one; the published records are the same.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import msgspec

from contracts.errors import UserError
from contracts.faults import Fault
from contracts.records import FinishReason, Sampling
from generation.config import GenerationConfig


class GenerationRequest(msgspec.Struct, frozen=True):
    """A request for `n` answers to one prompt; answer j is sampled with the seed `seed + j`."""

    prompt_ids: tuple[int, ...]
    n: int
    seed: int
    sampling: Sampling


class Answer(msgspec.Struct, frozen=True):
    """One sampled response."""

    response_ids: tuple[int, ...]
    """Includes the stop token at its end if `finish_reason` is "stop"."""
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    seed: int
    stop_string: str | None = None
    """The stop string that ended the response, if `finish_reason` is "stop_string"; the last token completes it."""


class EngineSettings(msgspec.Struct, frozen=True):
    """Settings that an engine needs in addition to the stage's config."""

    stop_ids: tuple[int, ...]
    """Token ids that end an answer."""
    max_length: int
    """Maximum sequence length: longest prompt plus longest answer."""
    dtype: str
    """Number format of weights and activations: float32, bfloat16 or float16."""
    on_gpu: bool
    log: Path
    """Log file of a server."""
    traces: Path | None = None
    """Folder for profiler traces, if any are to be written."""


class UpdateError(Exception):
    """The weights of a loaded engine could not be updated, or the update could not be verified."""


class SamplingEngine(Protocol):
    """An engine with the policy's weights loaded."""

    def generate(self, requests: Sequence[GenerationRequest], batch: str) -> Sequence[list[Answer] | Fault]:
        """Sample the answers to all requests as one batch, in order; a request that failed yields a `Fault`.

        Results do not depend on earlier batches of this engine. `batch` is a name, unique within this engine.
        """
        ...

    def reset(self) -> None:
        """Prepare for a new stage: clear the caches of earlier ones."""
        ...

    def profile(self, name: str) -> AbstractContextManager[None]:
        """Context that writes profiler traces into `EngineSettings.traces`, in files whose names begin with `name`."""
        ...

    def close(self) -> None:
        """Stop the processes that the engine started."""
        ...


def set_threads(parts: int) -> str:
    """Set OMP_NUM_THREADS, unless the user has, to the cores divided by `parts`, an engine's processes; returns it.

    Call it before torch loads. Without it, vLLM's throughput on a CPU drops to a fifth. The last bits of CPU results
    depend on it, so it must not depend on the number of replicas, which may not change results.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // parts)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def devices_per_replica(config: GenerationConfig) -> int:
    """GPUs per replica; 0 on a machine without GPUs, where vLLM's tensor parallel processes share the cores.

    Raises:
        UserError: the config asks for more GPUs than there are.
    """
    import torch

    present = torch.cuda.device_count()
    wanted = config.tensor_parallel * max(config.replicas, config.servers)
    if present == 0 and (config.tensor_parallel == 1 or config.engine == "vllm"):
        return 0
    if wanted > present:
        raise UserError(
            f"replicas (or servers) times tensor_parallel is {wanted}, but this machine shows {present} GPUs. "
            "Lower one of them, or check CUDA_VISIBLE_DEVICES."
        )
    return config.tensor_parallel
