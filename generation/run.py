"""The generation stage: samples K answers to every selected prompt and publishes them."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from contracts import resident
from contracts.artifacts import input_damage, model_fingerprint
from contracts.chat import ChatTokenizer
from contracts.errors import UserError
from contracts.faults import Faults
from contracts.fingerprint import digest, file_sha256
from contracts.jsonl import write_jsonl
from contracts.ledger import merge
from contracts.models import ModelInfo
from contracts.precision import resolve_dtype
from contracts.resident import Start
from contracts.stage import Context, Outcome
from contracts.workers import agree, share_shards
from generation.config import GenerationConfig
from generation.engine import EngineSettings, SamplingEngine, UpdateError, devices_per_replica, set_threads
from generation.prompts import check_policy, prompt_ids, select_prompts
from generation.rollouts import (
    Shard,
    answer_lengths,
    default_shard_size,
    longest_first,
    make_shards,
    sample_shard,
    shard_facts,
    shard_metrics,
    summary,
)
from generation.vllm_engine import UpdatableEngine

ENGINE_FIELDS = {
    *("engine", "logprob_mode", "max_num_seqs", "tensor_parallel", "memory_utilization", "kv_cache_mib"),
    *("stop", "guided", "thinking", "engine_args"),
}
"""Config fields that, in addition to `EngineSettings`, determine an engine."""
IGNORED_ENTRIES = ("_name_or_path", "transformers_version")
"""Entries of config.json that do not describe the architecture."""
EMPTY_FACTS = {"completions": 0, "stopped": 0, "response_tokens": 0, "prompt_tokens": 0}
"""Facts of a stage without prompts: after a draw of dynamic sampling in which no prompt had to be replaced."""
LENGTH_STEP = 128
"""The maximum sequence length is rounded up to a multiple of this, so that stages with similar prompts can share an
engine."""


def run(config: GenerationConfig, context: Context) -> Outcome:
    """Run the stage `generation`."""
    # Checks for user's mistakes, before anything large is loaded.
    longest_allowed = check_policy(config)
    prompts = select_prompts(config)
    if not prompts:
        return Outcome("prompts", EMPTY_FACTS, model_fingerprint(config.policy))

    # The chat template is applied once; only token ids are used from here on.
    threads = set_threads(config.tensor_parallel)
    with context.timed("load"):
        tokenizer = ChatTokenizer(config.policy, config.chat_template_kwargs, config.date)
        tokenizer.require_stop()
        fingerprint = model_fingerprint(config.policy)
        tokenized = [(prompt, prompt_ids(tokenizer, prompt, drop=config.refused == "drop")) for prompt in prompts]
        largest = max(max(ids or (), default=0) for _, ids in tokenized)
        ModelInfo.read(config.policy).require_ids(max(largest, *tokenizer.stop_ids), "a prompt (or a stop token)")
    shards = make_shards(tokenized, config.shard_size or default_shard_size(config), longest_allowed)
    settings = _settings(config, context, tokenizer, shards, longest_allowed)
    engine_facts: dict[str, Any] = {"dtype": settings.dtype, "engine": config.engine, "threads": threads}

    # Sampling: the shards are shared among the replicas.
    with contextlib.ExitStack() as stack:

        def open_worker() -> Callable[[str], None]:
            start = time.perf_counter()
            if config.dtype == "auto":  # processors differ, but all shards must have one dtype
                engine_facts["dtype"] = agree(context, "dtype", settings.dtype)
            agreed = msgspec.structs.replace(settings, dtype=engine_facts["dtype"])
            engine, engine_facts["start"] = get_engine(config, agreed, fingerprint)
            if isinstance(engine, UpdatableEngine) and engine.read_back_digest is not None:
                engine_facts["read_back"] = engine.read_back_digest
            if resident.must_close():
                stack.callback(engine.close)
            load = {"load": time.perf_counter() - start}  # counted with the worker's first shard
            load["weights"] = load["load"]  # the part of `load` without the tokenizer

            def make(name: str) -> None:
                shard = by_name[name]
                start = time.perf_counter()
                chosen = int(Path(name).stem.rpartition("-")[2]) in config.profile_shards
                with engine.profile(Path(name).stem) if chosen else contextlib.nullcontext():
                    rows, ledger, faults = sample_shard(shard, engine, tokenizer, config, fingerprint)
                sampled = time.perf_counter()
                write_jsonl(context.publication.scratch(name), rows)
                seconds = {**load, "compute": sampled - start, "save": time.perf_counter() - sampled}
                made = shard_facts(rows)
                facts = {**made, **faults.facts(), "settled": engine_facts}
                context.report_shard(name, shard_metrics(made, seconds["compute"]))
                context.publication.commit(name, ledger, rows=len(rows), seconds=seconds, facts=facts)
                load.clear()

            return make

        by_name = {shard.name: shard for shard in shards}
        workers = config.servers or config.replicas
        shared = workers > 1 or context.role in ("replica", "task")
        share_shards(
            context,
            longest_first(shards, answer_lengths(config.lengths)) if shared else list(by_name),
            open_worker,
            replicas=workers,
            devices=config.tensor_parallel if settings.on_gpu else 0,
        )
    if not context.publishes:
        return Outcome("prompts")

    receipts = [receipt for _, receipt in sorted(context.publication.receipts().items())]
    engine_facts |= receipts[0].facts.get("settled", {})  # of the process that sampled, perhaps on another machine
    made = [{name: fact for name, fact in receipt.facts.items() if name != "settled"} for receipt in receipts]
    faults = Faults(config.fail_on_error)
    faults.messages = [message for facts in made for message in facts.get("failures", [])]
    faults.require_few(merge((receipt.ledger for receipt in receipts), "prompts"))
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "vocabulary": tokenizer.vocabulary,
        "tokenizer": tokenizer.fingerprint,
    }
    facts = {**summary(made), **faults.facts(), **engine_facts, **ids, **tokenizer.counts}
    return Outcome("prompts", facts=facts, weights=fingerprint)


def _settings(
    config: GenerationConfig,
    context: Context,
    tokenizer: ChatTokenizer,
    shards: list[Shard],
    longest_allowed: int | None,
) -> EngineSettings:
    """The engine's settings.

    Raises:
        UserError: no prompt is left, or too many were dropped.
    """
    ledger = merge((shard.ledger for shard in shards), "prompts")
    lengths = [len(ids) for shard in shards for _, ids in shard.prompts]
    if not lengths:
        raise UserError(
            f"no prompt of {config.prompts} is left: {ledger} (too_long: more than {longest_allowed} tokens; refused: "
            "by the chat template). Raise max_prompt_tokens, lower max_new_tokens, or use another model or prompts."
        )
    ledger.stop_above(config.max_dropped, f"prompts of {config.prompts} (too_long: more than {longest_allowed} tokens)")
    # A replica or a task has the devices of one engine. A publisher loads no engine, and may have no GPU.
    alone = config if context.role is None else config.model_copy(update={"replicas": 1, "servers": 0})
    on_gpu = context.role != "publisher" and devices_per_replica(alone) > 0
    return EngineSettings(
        stop_ids=tokenizer.stop_ids,
        max_length=_round_length(max(lengths) + config.max_new_tokens, ModelInfo.read(config.policy).context_length),
        dtype=resolve_dtype(config.dtype, on_gpu=on_gpu, sampled=config.policy),
        on_gpu=on_gpu,
        log=context.publication.directory / "state" / f"server-{context.rank}.log",
        traces=context.traces if config.profile_shards else None,
    )


def _round_length(length: int, context: int | None) -> int:
    """Round a length up to a multiple of LENGTH_STEP, but not beyond the model's context."""
    whole = -(-length // LENGTH_STEP) * LENGTH_STEP
    return whole if context is None else max(length, min(whole, context))


def get_engine(config: GenerationConfig, settings: EngineSettings, fingerprint: str) -> tuple[SamplingEngine, Start]:
    """Return an engine with the policy's weights: a new one, or the one that an earlier stage left in this process.

    The weights of an engine of the same architecture and settings are updated in place.
    """
    fields = config.model_dump(mode="json", include=ENGINE_FIELDS)
    model = json.loads((config.policy / "config.json").read_bytes())
    architecture = {name: value for name, value in model.items() if name not in IGNORED_ENTRIES}
    if config.stop or config.guided or config.thinking:  # the engine decodes text with the tokenizer it was opened with
        architecture["tokenizer"] = file_sha256(config.policy / "tokenizer.json")
    settled = msgspec.to_builtins(msgspec.structs.replace(settings, log=Path()), enc_hook=str)

    def update(engine: SamplingEngine) -> None:
        from modeling.loading import check_weights

        assert isinstance(engine, UpdatableEngine)  # a kept engine was opened with the same `engine` setting
        check_weights(config.policy, "causal")
        try:
            engine.update(config.policy)
        except UpdateError as error:
            if damage := input_damage(config.policy):
                raise UserError(f"{config.policy} is damaged: {damage[0]}. Publish it again.") from error
            raise

    return resident.hold(
        "engine",
        fixed=digest([fields, settled, architecture]),
        content=fingerprint,
        open_=lambda: open_engine(config, settings),
        close=lambda engine: engine.close(),
        update=update if config.engine == "vllm" else None,
        begin=lambda engine: engine.reset(),
    )


def open_engine(config: GenerationConfig, settings: EngineSettings) -> SamplingEngine:
    """Open the engine that the config selects, after checking that the policy's weights are complete."""
    from modeling.loading import check_weights

    if config.engine == "transformers":
        from generation.transformers_engine import TransformersEngine

        return TransformersEngine(config, settings)
    # vLLM silently leaves weights uninitialized that the checkpoint lacks.
    check_weights(config.policy, "causal")
    if config.servers:
        from generation.vllm_server import VllmServer

        return VllmServer(config, settings)
    from generation.vllm_engine import VllmEngine

    return VllmEngine(config, settings)
