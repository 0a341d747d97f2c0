"""Config of the generation stage."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from contracts.config import Section, StageConfig, identity, input_path, runtime
from contracts.template import ChatFields

MINIMUM_TEMPERATURE = 0.01
"""vLLM silently raises what lies between 0 and this."""
MAXIMUM_TEMPERATURE = 10.0


class GenerationSettings(Section):
    """Sampling settings."""

    k: int = identity(4, ge=1, le=65536)
    """Answers per prompt."""
    temperatures: list[float] = identity([1.0], min_length=1)
    """Sampling temperatures; K is divided among them in equal parts, in order. 0 is greedy: one answer,
    whose log-probabilities are the model's own in either logprob_mode."""
    top_p: float = identity(1.0, gt=0, le=1)
    """Nucleus sampling: smallest set of tokens with at least this probability."""
    top_k: int = identity(0, ge=0)
    """Sample among the k likeliest tokens; 0: no limit."""
    max_new_tokens: int = identity(512, ge=1)
    """Longest answer in tokens; longer ones are truncated and keep finish_reason "length"."""
    max_prompt_tokens: int | None = identity(None, ge=1)
    """Longer prompts are dropped and counted; by default what the model's context leaves beside max_new_tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = identity("auto")
    """Number format of the engine; auto: bfloat16 on a GPU, and on a CPU that does not emulate it where the policy's
    weights are in half precision; else float32."""
    logprob_mode: Literal["processed", "raw"] = identity("processed")
    """Which behaviour log-probabilities to keep: of the sampled distribution, or of the model's own at T=1."""
    engine: Literal["vllm", "transformers"] = identity("vllm")
    """transformers is for platforms without vLLM: same records, slower."""
    shard_size: int | None = identity(None, ge=1)
    """Prompts per shard, the unit of batch composition and of resuming; by default eight full batches of samples."""
    max_num_seqs: int = identity(256, ge=1)
    """Maximum number of sequences that the engine batches."""
    tensor_parallel: int = identity(1, ge=1)
    """GPUs per replica (tensor parallel)."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the prompts is dropped."""
    fail_on_error: float = identity(0.0, ge=0, lt=1)
    """Share of the prompts for which the engine may fail (an error or an inconsistent answer); they are dropped and
    counted. 0: the first one stops the stage."""
    replicas: int = runtime(1, ge=1)
    """Data-parallel copies of the engine; they share the shards dynamically. On a CPU each has OMP_NUM_THREADS threads:
    set it to the cores divided by the replicas."""
    servers: int = runtime(0, ge=0)
    """OpenAI-compatible vLLM servers to start instead of in-process engines; 0: in-process. A server batches requests
    as they arrive, so the last bits of its log-probabilities can differ from one run to the next."""
    profile_shards: list[Annotated[int, Field(ge=0)]] = runtime([])
    """Shards, counted from 0, of whose sampling the engine writes a trace of torch's profiler: docs/hooks.md. A shard
    that was sampled before has none."""
    startup_seconds: float = runtime(600.0, gt=0)
    """Seconds that a server may take to become healthy."""
    memory_utilization: float = runtime(0.9, gt=0, le=1)
    """Share of a GPU's memory for the engine."""
    kv_cache_mib: int | None = runtime(None, ge=1)
    """Size of the KV cache; on a GPU by default what memory_utilization leaves, on a CPU enough for max_num_seqs
    sequences (at most 4 GiB). Less makes the engine evict sequences and compute them again."""


class GenerationConfig(GenerationSettings, ChatFields, StageConfig):
    """Sample K answers per prompt with the current policy."""

    stage: ClassVar[str] = "generation"
    code_version: ClassVar[int] = 2

    policy: Path = input_path()
    """Directory of the causal language model that samples."""
    prompts: Path = input_path()
    """Published prompts."""
    start: int = identity(0, ge=0)
    """Index of the first prompt to use; indices wrap around at the end of the prompt set."""
    count: int | None = identity(None, ge=1)
    """Number of prompts to use; all by default."""
    iteration: int = identity(0, ge=0)
    """Iteration that the rollouts belong to; recorded and part of every seed."""
    seed: int = identity(0, ge=0)
    """Seed of the run; each sample's own seed is derived from it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.k % len(self.temperatures):
            raise ValueError(
                f"k={self.k} cannot be divided equally among the {len(self.temperatures)} temperatures "
                f"{self.temperatures}. Make k a multiple of their number."
            )
        if any(temperature != 0 and temperature < MINIMUM_TEMPERATURE for temperature in self.temperatures):
            raise ValueError(f"temperatures {self.temperatures} must be 0 (greedy) or at least {MINIMUM_TEMPERATURE}.")
        if max(self.temperatures) > MAXIMUM_TEMPERATURE:
            raise ValueError(
                f"temperatures {self.temperatures}: above {MAXIMUM_TEMPERATURE:g} all tokens are about as likely, and "
                "answers are noise. Most use 0.6 to 1.2."
            )
        if 0 in self.temperatures and self.k > len(self.temperatures):
            raise ValueError(
                f"temperature 0 is greedy, so its {self.k // len(self.temperatures)} answers would all be the same. "
                "Set k to the number of temperatures, or a temperature above 0."
            )
        if self.servers and (self.engine != "vllm" or self.replicas > 1):
            raise ValueError("servers needs engine=vllm and replicas=1: every server is a replica.")
        return self
