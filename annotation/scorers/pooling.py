"""Scorers whose model vLLM's pooling engine can compute in the place of transformers."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, model_validator

from annotation.scorers.base import ChatModelSettings
from contracts.config import identity
from contracts.declaration import load
from contracts.engine_args import checked_arguments, require_known
from contracts.model_size import Size
from contracts.models import ModelInfo
from contracts.outlook import AnswerStats
from contracts.preflight import Finding, Inspected

OURS = {
    "model": "it is the scorer's",
    "tokenizer": "the engine is given token ids",
    "runner": "the stage scores",
    "convert": "the stage scores",
    "dtype": "set `dtype`",
    "max_model_len": "set `max_length`",
    "max_num_batched_tokens": "set `batch_tokens`",
    "kv_cache_memory_bytes": "it follows from max_length and batch_tokens",
    "gpu_memory_utilization": "memory follows from max_length and batch_tokens",
    "tensor_parallel_size": "an engine has one device; several engines are `replicas`",
    "pipeline_parallel_size": "an engine has one device; several engines are `replicas`",
    "data_parallel_size": "several engines are `replicas`",
    "trust_remote_code": "code of a model is never run",
    "seed": "nothing is drawn",
}
"""Arguments that the stage sets itself or does not let through, and why."""
MOST_SEQUENCES = 256
"""Sequences that an engine of vLLM computes at a time."""
BLOCK = 128
"""Tokens of a block of its KV cache, on a CPU; fewer elsewhere."""
LEAST_CACHE = 64 << 20
"""Bytes of its KV cache."""


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    return checked_arguments(value, OURS)


class PooledSettings(ChatModelSettings):
    """Settings of scorers with a choice of what computes their model."""

    engine: Literal["transformers", "vllm"] = identity("transformers", later=True)
    """Engine for the model: transformers, or vLLM's pooling engine, which runs in the environment of generation. Their
    scores differ in the last digits, and vLLM's are checked against transformers' at the start."""
    engine_args: Annotated[dict[str, Any], AfterValidator(_checked)] = identity({}, later=True)
    """For engine=vllm: further engine arguments, by their Python names."""

    pooled_as: ClassVar[str]
    """What vLLM computes it as, for messages."""

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine_args and self.engine != "vllm":
            raise ValueError("engine_args is for engine=vllm. Set that, or leave engine_args out.")
        return self

    @property
    def runs_in(self) -> str:
        """Where vLLM is, if nothing else is said."""
        named = "environment" in self.model_fields_set
        return "generation" if self.engine == "vllm" and not named else self.environment

    def examine(self) -> None:
        """And that vLLM can compute it."""
        super().examine()
        if self.engine == "vllm":
            assert self.model is not None
            load("modeling.vllm_process:require_pooling")(ModelInfo.read(self.model), self.pooled_as)
            require_known(self.engine_args)

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """And that vLLM can compute it."""
        yield from super().preflight(stage)
        if self.engine == "vllm" and self.model is not None and (self.model / "config.json").is_file():
            self.examine()
            yield Finding("ok", f"{self.model}: vLLM knows its architecture as {self.pooled_as}")

    def libraries(self) -> tuple[str, ...]:
        """And its engine."""
        return (*super().libraries(), *(["vllm"] if self.engine == "vllm" else []))

    def memory(self, size: Size, answers: AnswerStats | None, *, on_gpu: bool) -> dict[str, int]:
        """With vLLM's KV cache. What transformers takes for the comparison is freed before."""
        parts = super().memory(size, answers, on_gpu=on_gpu)
        if self.engine == "vllm":
            longest = self.max_length or size.context or self.batch_tokens
            parts["cache"] = cache_bytes(size, longest, self.batch_tokens, self.bytes_per_number(on_gpu=on_gpu))
        return parts


def cache_bytes(size: Size, longest: int, batch_tokens: int, number: int) -> int:
    """Bytes of a KV cache that holds the sequences of a forward pass, or one of the longest.

    Args:
        number: bytes of a number.
    """
    tokens = max(longest, batch_tokens) + MOST_SEQUENCES * BLOCK
    return max(LEAST_CACHE, size.cache_numbers * number * tokens)
