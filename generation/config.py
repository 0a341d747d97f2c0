"""Config of the generation stage."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from contracts.config import Section, StageConfig, identity, input_path, runtime
from contracts.fingerprint import digest
from contracts.template import ChatFields
from generation.engine_args import checked_arguments

MINIMUM_TEMPERATURE = 0.01
"""vLLM silently raises temperatures between 0 and this one."""
MAXIMUM_TEMPERATURE = 10.0
VLLM_MAXIMUM = 2.0
"""vLLM refuses requests with a higher temperature."""


class GuidedSection(Section):
    """Constraint on the output format of every response: exactly one of these."""

    json_schema: dict[str, Any] | None = identity(None)
    """Responses are JSON that fits this schema."""
    regex: str | None = identity(None, min_length=1)
    """Responses match this regular expression as a whole."""
    choice: list[Annotated[str, Field(min_length=1)]] | None = identity(None, min_length=1)
    """Responses are one of these texts."""
    grammar: str | None = identity(None, min_length=1)
    """Responses are sentences of this grammar, in the EBNF of llama.cpp."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of {', '.join(type(self).model_fields)}, not {len(given)}.")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"regex {self.regex!r} is not a regular expression: {error}.") from error
        if self.choice is not None and len(set(self.choice)) < len(self.choice):
            raise ValueError("choice contains a text twice.")
        return self

    @property
    def form(self) -> tuple[str, Any]:
        """Name and value of the field that is set."""
        return next((name, value) for name in type(self).model_fields if (value := getattr(self, name)) is not None)

    @property
    def label(self) -> str:
        """Short form for the records: the field's name and a digest of its value."""
        name, value = self.form
        return f"{name} {digest(value)[:16]}"


class ThinkingSection(Section):
    """Limit of a model's reasoning before its answer."""

    tokens: int = identity(ge=0)
    """Reasoning tokens after which the end of the reasoning is forced; max_new_tokens includes them."""
    start: str = identity("<think>", min_length=1)
    """The text with which the model or its template begins the reasoning."""
    end: str = identity("</think>", min_length=1)
    """The text that ends the reasoning. It may begin with words before the mark, which are forced as well: "I have to
    answer now.</think>"."""


EngineArguments = Annotated[dict[str, Any], AfterValidator(checked_arguments)]


class GenerationSettings(Section):
    """Sampling settings."""

    k: int = identity(4, ge=1, le=65536)
    """Responses per prompt."""
    temperatures: list[float] = identity([1.0], min_length=1)
    """Sampling temperatures; K is divided among them in equal parts, in order. 0 is greedy: one response, whose
    log-probabilities are those at temperature 1 in either logprob_mode."""
    top_p: float = identity(1.0, gt=0, le=1)
    """Nucleus sampling: smallest set of tokens with at least this probability."""
    top_k: int = identity(0, ge=0)
    """Sample among the k most likely tokens; 0: no limit."""
    min_p: float = identity(0.0, later=True, ge=0, le=1)
    """Sample among the tokens that are at least this share as likely as the most likely one; 0: no limit."""
    min_new_tokens: int = identity(0, later=True, ge=0)
    """Minimum response length in tokens: until then EOS is not sampled, and texts of `stop` do not end the response."""
    repetition_penalty: float = identity(1.0, later=True, gt=0, le=10)
    """For tokens that are in the prompt or the response so far, positive logits are divided by this number and others
    are multiplied by it (Keskar et al. 2019, arXiv 1909.05858); 1: no penalty."""
    presence_penalty: float = identity(0.0, later=True, ge=-2, le=2)
    """Number that is subtracted from the logits of tokens in the response so far."""
    frequency_penalty: float = identity(0.0, later=True, ge=-2, le=2)
    """Number that is subtracted from a token's logit for each of its occurrences in the response so far."""
    stop: list[Annotated[str, Field(min_length=1)]] = identity([], later=True)
    """Texts that end a response; its finish_reason is then "stop_string"."""
    include_stop: bool = identity(False, later=True)
    """Keep the stop text in the response's `text`, for example `</answer>`."""
    guided: GuidedSection | None = identity(None, later=True)
    """Constrain the output format (vLLM's structured outputs): one of {json_schema: {...}}, {regex: "..."}, {choice:
    [...]}, {grammar: "..."}."""
    thinking: ThinkingSection | None = identity(None, later=True)
    """Limit the reasoning of a reasoning model (vLLM): {tokens: 512}."""
    engine_args: EngineArguments = identity({}, later=True)
    """Further engine arguments of vLLM, by their Python names: {enable_prefix_caching: false}. Arguments that the stage
    sets itself are refused; the message names the key to set instead."""
    max_new_tokens: int = identity(512, ge=1)
    """Maximum response length in tokens; longer ones are truncated and have finish_reason "length"."""
    max_prompt_tokens: int | None = identity(None, ge=1)
    """Longer prompts are dropped and counted; by default the model's context minus max_new_tokens."""
    refused: Literal["error", "drop"] = identity("error", later=True)
    """Treatment of prompts that the chat template refuses, for example because of a system turn or two user turns in a
    row: stop with the template's message, or drop and count them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = identity("auto")
    """Number format of the engine; auto: bfloat16 on a GPU, and on a CPU with native support if the policy's weights
    are in half precision; else float32."""
    logprob_mode: Literal["processed", "raw"] = identity("processed")
    """Behaviour log-probabilities to record: those of the sampled distribution, or of the model's own (T=1)."""
    engine: Literal["vllm", "transformers"] = identity("vllm")
    """Inference engine; transformers is for platforms without vLLM: the same records, but slower."""
    shard_size: int | None = identity(None, ge=1)
    """Prompts per shard, the unit of batch composition and of resuming; by default eight full batches of samples."""
    max_num_seqs: int = identity(256, ge=1)
    """Maximum number of sequences in the engine's batch."""
    tensor_parallel: int = identity(1, ge=1)
    """GPUs per replica (tensor parallel)."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the prompts is dropped."""
    fail_on_error: float = identity(0.0, ge=0, lt=1)
    """Share of the prompts on which the engine may fail (an error or an inconsistent response); they are dropped and
    counted. 0: the first failure stops the stage."""
    replicas: int = runtime(1, ge=1)
    """Data-parallel copies of the engine; they share the shards dynamically. On a CPU each has OMP_NUM_THREADS threads:
    set it to the cores divided by the replicas."""
    servers: int = runtime(0, ge=0)
    """OpenAI-compatible vLLM servers to start instead of in-process engines; 0: in-process. A server batches requests
    as they arrive, so the last bits of its log-probabilities can differ from one run to the next."""
    profile_shards: list[Annotated[int, Field(ge=0)]] = runtime([])
    """Shards, counted from 0, for which the engine writes a torch profiler trace: docs/hooks.md. Shards that an earlier
    attempt sampled are not traced again."""
    startup_seconds: float = runtime(600.0, gt=0)
    """Startup timeout of a server."""
    memory_utilization: float = runtime(0.9, gt=0, le=1)
    """Share of a GPU's memory for the engine."""
    kv_cache_mib: int | None = runtime(None, ge=1)
    """Size of the KV cache; on a GPU by default what memory_utilization leaves, on a CPU enough for max_num_seqs
    sequences (at most 4 GiB). With less the engine preempts sequences and recomputes them."""

    @property
    def departures(self) -> dict[str, Any]:
        """The settings that make answers deviate from the policy's own distribution; empty if none does.

        `stop` and max_new_tokens only end answers, and change no token's probability.
        """
        fields = GenerationSettings.model_fields
        changed = {name: value for name in DISTRIBUTION if (value := getattr(self, name)) != fields[name].default}
        return {name: _as_data(value) for name, value in changed.items()}


DISTRIBUTION = (
    *("temperatures", "top_p", "top_k", "min_p", "min_new_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "guided", "thinking"),
)
"""Settings that change the probabilities of tokens."""


def _as_data(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_unset=True) if isinstance(value, Section) else value


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
    lengths: list[Path] = runtime([])
    """Rollouts of earlier iterations, the latest first. If several processes share the shards, prompts with the longest
    responses in the first rollouts that exist are sampled first, so that no process is left with a long one at the
    end."""

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
                f"temperatures {self.temperatures}: above {MAXIMUM_TEMPERATURE:g} all tokens are almost equally "
                "likely, and answers are noise. Usual values are 0.6 to 1.2."
            )
        if 0 in self.temperatures and self.k > len(self.temperatures):
            raise ValueError(
                f"temperature 0 is greedy, so its {self.k // len(self.temperatures)} answers would all be the same. "
                "Set k to the number of temperatures, or a temperature above 0."
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}. Lower it."
            )
        if self.guided is not None and self.logprob_mode == "raw":
            raise ValueError(
                "guided with logprob_mode=raw: vLLM masks tokens before it computes the model's own "
                "log-probabilities. Set logprob_mode=processed."
            )
        alone = {"guided": self.guided, "thinking": self.thinking, "engine_args": self.engine_args}
        if self.engine != "vllm" and (asked := [name for name, value in alone.items() if value]):
            raise ValueError(f"{asked[0]} is for engine=vllm; engine={self.engine} does not support it. Leave it out.")
        if self.engine == "vllm" and max(self.temperatures) > VLLM_MAXIMUM:
            raise ValueError(
                f"temperatures {self.temperatures}: vLLM accepts none above {VLLM_MAXIMUM:g}. Lower it, or set "
                "engine=transformers."
            )
        if self.servers and (self.engine != "vllm" or self.replicas > 1):
            raise ValueError("servers needs engine=vllm and replicas=1: every server is a replica.")
        return self
