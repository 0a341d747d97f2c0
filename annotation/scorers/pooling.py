"""Settings of scorers whose model can run on vLLM's pooling engine instead of transformers."""

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

RESERVED_ARGUMENTS = {
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
"""Engine arguments that the user cannot set, with the reason."""
MAX_SEQUENCES = 256
"""Maximum number of sequences that vLLM computes at a time."""
BLOCK = 128
"""Tokens per block of vLLM's KV cache on a CPU; on other devices blocks are smaller."""
MIN_CACHE = 64 << 20
"""Minimum size of vLLM's KV cache, in bytes."""


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    return checked_arguments(value, RESERVED_ARGUMENTS)


class PooledSettings(ChatModelSettings):
    """Settings of scorers with a choice of engine for their model."""

    engine: Literal["transformers", "vllm"] = identity("transformers", later=True)
    """Engine for the model: transformers, or vLLM's pooling engine, which runs in the environment of generation. Their
    scores differ in the last digits, and vLLM's are checked against transformers' at the start."""
    engine_args: Annotated[dict[str, Any], AfterValidator(_checked)] = identity({}, later=True)
    """For engine=vllm: further engine arguments, by their Python names."""

    pooled_as: ClassVar[str]
    """What the model is to vLLM, for messages: "a reward model"."""

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine_args and self.engine != "vllm":
            raise ValueError("engine_args is for engine=vllm. Set that, or leave engine_args out.")
        return self

    @property
    def runs_in(self) -> str:
        """The environment of its stage; with vLLM by default that of generation, where vLLM is installed."""
        named = "environment" in self.model_fields_set
        return "generation" if self.engine == "vllm" and not named else self.environment

    def check(self) -> None:
        """Check the model, and that vLLM supports it."""
        super().check()
        if self.engine == "vllm":
            assert self.model is not None
            load("modeling.vllm_process:require_pooling")(ModelInfo.read(self.model), self.pooled_as)
            require_known(self.engine_args)

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """Check the model, and that vLLM supports it."""
        yield from super().preflight(stage)
        if self.engine == "vllm" and self.model is not None and (self.model / "config.json").is_file():
            self.check()
            yield Finding("ok", f"{self.model}: vLLM knows its architecture as {self.pooled_as}")

    def libraries(self) -> tuple[str, ...]:
        """The libraries of the model and of its engine."""
        return (*super().libraries(), *(["vllm"] if self.engine == "vllm" else []))

    def memory(self, size: Size, answers: AnswerStats | None, *, on_gpu: bool) -> dict[str, int]:
        """Memory of the model, plus vLLM's KV cache. The transformers model for the parity check is freed before."""
        parts = super().memory(size, answers, on_gpu=on_gpu)
        if self.engine == "vllm":
            longest = self.max_length or size.context or self.batch_tokens
            parts["cache"] = cache_bytes(size, longest, self.batch_tokens, self.bytes_per_number(on_gpu=on_gpu))
        return parts


def cache_bytes(size: Size, longest: int, batch_tokens: int, number: int) -> int:
    """Bytes of a KV cache that holds the sequences of a forward pass, or the longest sequence if that is more.

    Args:
        number: bytes per number.
    """
    tokens = max(longest, batch_tokens) + MAX_SEQUENCES * BLOCK
    return max(MIN_CACHE, size.cache_elements * number * tokens)
