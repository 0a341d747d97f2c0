"""Declares the stage `generation`, which samples K answers to every prompt from the current policy."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.architectures import text_settings
from contracts.declaration import ModelUse, ProcessLayout, Stage, Workload
from contracts.errors import UserError
from contracts.model_size import Size
from contracts.models import ModelInfo
from contracts.operations import ModelLayout, Operations, shape_of
from contracts.outlook import (
    FILE_BYTES,
    ID_BYTES,
    LOGPROB_BYTES,
    PROCESS_BYTES,
    SAMPLE_BYTES,
    STAGE_BYTES,
    TEXT_BYTES,
    AnswerStats,
    Memory,
    Outlook,
    RowStats,
)
from contracts.records import ROLLOUTS
from generation.config import GenerationConfig

UNKNOWN_PROMPT_BYTES = 2048
"""Assumed bytes per prompt while the prompts are unknown."""


def check_split(parts: int, model: Path) -> None:
    """Check that tensor parallelism can split a model's attention heads, by its config.json alone.

    Raises:
        UserError: it cannot; the message names the number that prevents it.
    """
    if parts == 1:
        return
    config = text_settings(json.loads((model / "config.json").read_bytes()))
    heads = config.get("num_attention_heads", config.get("n_head"))
    shared = config.get("num_key_value_heads") or heads
    for name, count, fits in (
        ("num_attention_heads", heads, isinstance(heads, int) and heads % parts == 0),
        ("num_key_value_heads", shared, isinstance(shared, int) and max(shared, parts) % min(shared, parts) == 0),
    ):
        if count is not None and not fits:
            raise UserError(
                f"generation.tensor_parallel is {parts}, by which {name} ({count}) of {model} cannot be split. Set it "
                "to a divisor, and generation.replicas to more."
            )


@dataclass(frozen=True)
class Generation(Stage[GenerationConfig]):
    """Sampling of answers."""

    layout_keys: tuple[str, ...] = ("replicas",)
    memory_fix: str = "Raise generation.tensor_parallel, lower generation.max_num_seqs, or free memory."

    def models(self, config: GenerationConfig) -> tuple[ModelUse, ...]:
        """The policy."""
        tokens = (config.max_prompt_tokens or 1) + config.max_new_tokens
        checks = (
            ModelInfo.require_causal,
            lambda model: model.require_engine(config.engine),
            ModelInfo.require_chat_template,
            lambda model: model.require_length(tokens, "prompt and answer together"),
        )
        return (ModelUse(config.policy, checks, functools.partial(check_split, config.tensor_parallel)),)

    def libraries(self, config: GenerationConfig) -> tuple[str, ...]:
        """Libraries of the engine."""
        return ("torch", "transformers", *(["vllm"] if config.engine == "vllm" else []))

    def memory(self, config: GenerationConfig, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """Memory of one replica."""
        size = outlook.size_of(config.policy)
        return None if size is None else generation_memory(config, size, self.answers(config, outlook), on_gpu=on_gpu)

    def operations(self, config: GenerationConfig, outlook: Outlook, *, on_gpu: bool) -> Operations | None:
        """One prefill per prompt, and decoding of all answers, at most max_num_seqs at a time."""
        size, answers = outlook.size_of(config.policy), self.answers(config, outlook)
        if size is None or answers is None:
            return None
        copies = max(config.replicas, config.servers, 1)
        shard = config.shard_size * config.k if config.shard_size is not None else answers.count
        return Operations(
            kind="sampling",
            model=shape_of(size),
            number=bytes_per_number(config, on_gpu=on_gpu),
            layout=ModelLayout(dp=copies, tp=config.tensor_parallel),
            sequences=answers.count,
            prompt_tokens=answers.prompts.count * answers.mean_prompt,
            answer_tokens=answers.count * answers.longest_answer,
            length=answers.mean_prompt + answers.longest_answer,
            logits=answers.count * answers.longest_answer,
            batch=max(1, min(config.max_num_seqs, shard, -(-answers.count // copies))),
        )

    def published_bytes(self, config: GenerationConfig, outlook: Outlook) -> int | None:
        """prompts · (8 · text + 512) + prompts · K · (max_new_tokens · 40 + 256).

        A token has an id (7 bytes), a log-probability (24) and text (9).
        """
        answers = self.answers(config, outlook)
        if answers is None:
            return None
        answer_bytes = answers.count * (answers.longest_answer * (ID_BYTES + LOGPROB_BYTES + TEXT_BYTES) + SAMPLE_BYTES)
        return answers.prompt_bytes + answer_bytes + answers.shards * FILE_BYTES + STAGE_BYTES

    def workload(self, config: GenerationConfig) -> Workload:
        """Generation: any number of tasks share the shards."""
        return "generation"

    def gpus(self, config: GenerationConfig) -> int:
        """GPUs of all servers, or of one in-process engine."""
        return config.tensor_parallel * max(1, config.servers)

    def layout(self, config: GenerationConfig) -> ProcessLayout:
        """Replicas, each on tensor_parallel devices."""
        network_keys = f"servers={config.servers}" if config.servers else ""
        if not network_keys and config.tensor_parallel > 1:
            network_keys = f"tensor_parallel={config.tensor_parallel}"
        return ProcessLayout(config.replicas, group_size=config.tensor_parallel, network_keys=network_keys)

    def spread(self, config: GenerationConfig, devices: int, nodes: int | None = None) -> GenerationConfig:
        """The config with as many replicas as fit on the devices, unless it sets `replicas` or `servers`."""
        replicas = devices // config.tensor_parallel
        if replicas <= 1 or config.servers or "replicas" in config.model_fields_set:
            return config
        return config.model_copy(update={"replicas": replicas})

    def with_layout(self, config: GenerationConfig, sizes: Mapping[str, Any]) -> GenerationConfig:
        """The config with this number of replicas."""
        return config.model_copy(update=sizes)

    def label(self, config: GenerationConfig) -> str:
        """A label for engine, dtype and number of engines: stages with the same ones can share the engines."""
        engines = max(config.replicas, config.servers, 1)
        return f"{config.engine} {config.dtype}" + (f" in {engines}" if engines > 1 else "")

    def answers(self, config: GenerationConfig, outlook: Outlook) -> AnswerStats | None:
        """K answers to every prompt."""
        prompts = outlook.rows_of(config.prompts)
        size = outlook.size_of(config.policy)
        limits = [config.max_prompt_tokens] if config.max_prompt_tokens is not None else []
        if size is not None and size.context is not None:
            limits.append(max(1, size.context - config.max_new_tokens))
        if prompts is not None:
            limits.append(prompts.longest_tokens)
        elif config.count is not None:
            prompts = RowStats(config.count, config.count * UNKNOWN_PROMPT_BYTES, UNKNOWN_PROMPT_BYTES)
        if prompts is None:
            return None
        count = min(config.count or prompts.count, prompts.count)
        longest = min(limits, default=prompts.longest_tokens)
        share = prompts.bytes * count // max(1, prompts.count)
        shards = -(-count // (config.shard_size or max(1, 8 * config.max_num_seqs // config.k)))
        return AnswerStats(RowStats(count, share, prompts.longest), config.k, longest, config.max_new_tokens, shards)

    def tokens(self, config: GenerationConfig) -> tuple[int, int]:
        """The config's limits on the tokens of a prompt and of an answer."""
        return config.max_prompt_tokens or 0, config.max_new_tokens


def bytes_per_number(config: GenerationConfig, *, on_gpu: bool) -> int:
    """Bytes per number in the engine's dtype."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(config.dtype, 2 if on_gpu else 4)


def generation_memory(config: GenerationConfig, size: Size, answers: AnswerStats | None, *, on_gpu: bool) -> Memory:
    """Estimate the memory of one replica, on each of its t = tensor_parallel devices, or on a CPU in each process.

    P is the number of parameters, a the bytes per number, and k the width of the keys.

    Weights: a·P / t. KV cache: vLLM on a GPU uses the memory that memory_utilization leaves, but needs at least room
    for the longest sequence (2 · layers · k · a / t bytes per token); on a CPU it has room for max_num_seqs sequences,
    between 64 MiB and 4 GiB (generation/vllm_engine.py), unless kv_cache_mib is set. The cache of transformers grows to
    a batch of max_num_seqs, twice that while its tensors are copied to grow. Logits: max_num_seqs positions at 32 bytes
    per token of the vocabulary, because the sampler has several copies, some in fp64.
    """
    number = bytes_per_number(config, on_gpu=on_gpu)
    batch, longest = config.max_num_seqs, size.context or 4096
    if answers is not None:
        batch, longest = min(batch, answers.count), answers.longest
        if config.shard_size is not None:
            batch = min(batch, config.shard_size * config.k)
    elif config.max_prompt_tokens is not None:
        longest = config.max_prompt_tokens + config.max_new_tokens
    token = size.cache_elements * number
    devices = config.tensor_parallel
    if config.engine == "transformers":
        cache = 2 * batch * longest * token
    elif config.kv_cache_mib is not None:
        cache = config.kv_cache_mib << 20
    elif on_gpu:
        cache = longest * token // devices
    else:
        cache = min(max(config.max_num_seqs * -(-longest // 128) * 128 * token // devices, 64 << 20), 4 << 30)
    parts = {
        "weights": size.parameters * number // devices,
        "KV cache": cache,
        "logits": 32 * batch * size.vocabulary,
        "process": PROCESS_BYTES,
    }
    share = config.memory_utilization if on_gpu and config.engine == "vllm" else 1.0
    processes = max(config.replicas, config.servers) * (1 if on_gpu or config.engine == "transformers" else devices)
    return Memory(parts, processes, share)


GENERATION = Generation(GenerationConfig, ROLLOUTS, "generation.run:run", preflight="generation.preflight:check")
