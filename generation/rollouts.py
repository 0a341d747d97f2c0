"""Builds requests from prompts, and the published records from answers. Pure functions, given an engine."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from contracts.artifacts import Artifact
from contracts.chat import ChatTokenizer
from contracts.faults import FAILED, Fault, Faults
from contracts.ledger import Ledger
from contracts.manifest import MANIFEST
from contracts.records import ROLLOUTS, Completion, FinishReason, Prompt, Rollout, Sampling
from contracts.seeds import derive_seed
from generation import stop_strings
from generation.config import GenerationConfig
from generation.engine import Answer, GenerationRequest, SamplingEngine

REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


PREFILL_TOKENS = 8
"""Last tokens of a prefill that are decoded together with the answer, so that the space between them is right."""


class Shard(msgspec.Struct, frozen=True):
    """Consecutive prompts that are sampled as one batch, and published as one file."""

    name: str
    prompts: tuple[tuple[Prompt, tuple[int, ...]], ...]
    """The prompts that are not dropped, with their token ids."""
    ledger: Ledger


def default_shard_size(config: GenerationConfig) -> int:
    """Default number of prompts per shard: eight full batches of samples, so that the partial batch at the end costs
    little.

    It depends only on the identity of the stage, never on the machine: the shard decides which prompts are batched
    together, and so the last bits of the results.
    """
    return max(1, 8 * config.max_num_seqs // config.k)


def make_shards(
    prompts: Sequence[tuple[Prompt, tuple[int, ...] | None]], size: int, longest: int | None
) -> list[Shard]:
    """Cut the prompts into shards of `size`; the last one may be smaller.

    Prompts that the chat template refused (None) and those of more than `longest` tokens are dropped, and counted.
    """
    shards = []
    for number, start in enumerate(range(0, len(prompts), size)):
        chunk = prompts[start : start + size]
        rendered = [(prompt, ids) for prompt, ids in chunk if ids is not None]
        kept = tuple((prompt, ids) for prompt, ids in rendered if longest is None or len(ids) <= longest)
        ledger = Ledger("prompts")
        ledger.keep(len(kept))
        ledger.drop("too_long", len(rendered) - len(kept))
        ledger.drop("refused", len(chunk) - len(rendered))
        shards.append(Shard(f"shard-{number:05}.jsonl", kept, ledger))
    return shards


def answer_lengths(rollouts: Sequence[Path]) -> dict[str, float]:
    """Mean answer length in tokens by prompt id, from the first of the rollouts that is published and not released."""
    for path in rollouts:
        if (path / MANIFEST).is_file() and not (artifact := Artifact.open(path, ROLLOUTS)).released:
            return {
                row.prompt_id: statistics.fmean(len(completion.response_ids) for completion in row.completions)
                for row in artifact.rows(Rollout)
            }
    return {}


def longest_first(shards: Sequence[Shard], lengths: Mapping[str, float]) -> list[str]:
    """The shards' names in descending order of expected answer tokens; unknown prompts get the mean of `lengths`."""
    usual = statistics.fmean(lengths.values()) if lengths else 1.0
    expected = {
        shard.name: sum(lengths.get(prompt.prompt_id, usual) for prompt, _ in shard.prompts) for shard in shards
    }
    return sorted(expected, key=lambda name: (-expected[name], name))


def requests_of(prompt: Prompt, ids: tuple[int, ...], config: GenerationConfig) -> list[GenerationRequest]:
    """Build one request per temperature, each for an equal part of the K answers."""
    requests = []
    for group, temperature in enumerate(config.temperatures):
        greedy = temperature == 0
        sampling = Sampling(
            temperature=temperature,
            top_p=1.0 if greedy else config.top_p,
            top_k=0 if greedy else config.top_k,
            max_tokens=config.max_new_tokens,
            **_optional_parameters(config, greedy=greedy),
        )
        seed = derive_seed(config.seed, config.iteration, prompt.prompt_id, group)
        requests.append(GenerationRequest(ids, config.k // len(config.temperatures), seed, sampling))
    return requests


def _optional_parameters(config: GenerationConfig, *, greedy: bool) -> dict[str, Any]:
    """The optional sampling parameters that are set; those without effect are not recorded."""
    found: dict[str, Any] = {}
    if config.min_p and not greedy:
        found["min_p"] = config.min_p
    if config.min_new_tokens:
        found["min_tokens"] = config.min_new_tokens
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        if (value := getattr(config, name)) != type(config).model_fields[name].default:
            found[name] = value
    if config.stop:
        found["stop"] = tuple(config.stop)
    if config.guided is not None:
        found["guided"] = config.guided.label
    if config.thinking is not None:
        found["thinking_tokens"] = config.thinking.tokens
    return found


def sample_shard(
    shard: Shard, engine: SamplingEngine, tokenizer: ChatTokenizer, config: GenerationConfig, policy: str
) -> tuple[list[Rollout], Ledger, Faults]:
    """Sample one shard; the rows are in the order of the prompts, without those that failed.

    Args:
        shard: the prompts.
        engine: the engine with the policy.
        tokenizer: the policy's tokenizer.
        config: the stage's config.
        policy: fingerprint of the weights in `engine`.
    """
    # Long prompts first: their prefill is expensive, and the requests left at the end should be short.
    order = sorted(range(len(shard.prompts)), key=lambda index: -len(shard.prompts[index][1]))
    requests = [request for index in order for request in requests_of(*shard.prompts[index], config)]
    answers = engine.generate(requests, shard.name)
    if len(answers) != len(requests):
        raise RuntimeError(f"{shard.name}: {len(requests)} requests, but {len(answers)} results")
    faults = Faults(config.fail_on_error)
    rollouts: list[Rollout | None] = [None] * len(shard.prompts)
    groups = len(config.temperatures)
    for position, index in enumerate(order):
        mine = slice(position * groups, (position + 1) * groups)
        prompt, ids = shard.prompts[index]
        try:
            prefill = ids[-PREFILL_TOKENS:] if prompt.messages[-1].role == "assistant" else ()
            completions = _completions(
                requests[mine], answers[mine], tokenizer, prefill, include_stop=config.include_stop
            )
        except RuntimeError as error:
            faults.add(Fault(error))
            continue
        rollouts[index] = Rollout(
            prompt_id=prompt.prompt_id,
            messages=prompt.messages,
            prompt_ids=ids,
            completions=completions,
            policy=policy,
            iteration=config.iteration,
            logprob_mode=config.logprob_mode,
            answer=prompt.answer,
            tags=prompt.tags,
            tools=prompt.tools,
        )
    made = [rollout for rollout in rollouts if rollout is not None]
    ledger = Ledger("prompts", dropped=dict(shard.ledger.dropped))
    ledger.rows_in = sum(ledger.dropped.values())
    ledger.keep(len(made))
    ledger.drop(FAILED, len(rollouts) - len(made))
    return made, ledger, faults


def _completions(
    requests: Sequence[GenerationRequest],
    answers: Sequence[Sequence[Answer] | Fault],
    tokenizer: ChatTokenizer,
    prefill: Sequence[int],
    *,
    include_stop: bool,
) -> tuple[Completion, ...]:
    completions: list[Completion] = []
    for request, group in zip(requests, answers, strict=True):
        if isinstance(group, Fault):
            raise group.error
        if len(group) != request.n:
            raise RuntimeError(f"{request.n} answers were requested, but the engine returned {len(group)}")
        for answer in group:
            check_answer(answer, request.sampling.max_tokens, tokenizer.stop_ids)
            completions.append(
                Completion(
                    sample=len(completions),
                    response_ids=answer.response_ids,
                    text=_text(answer, tokenizer, prefill, include_stop=include_stop),
                    finish_reason=answer.finish_reason,
                    logprobs=answer.logprobs,
                    seed=answer.seed,
                    sampling=request.sampling,
                )
            )
    return tuple(completions)


def _text(answer: Answer, tokenizer: ChatTokenizer, prefill: Sequence[int], *, include_stop: bool) -> str:
    """The text of an answer after the last tokens of its `prefill`, up to the stop string if one ended it."""
    text = tokenizer.text(answer.response_ids, prefill)
    if answer.stop_string is None:
        return text
    before = tokenizer.text(answer.response_ids[:-1], prefill)
    found = stop_strings.cut_at_stop(text, before, answer.stop_string, include=include_stop)
    if found is None:
        raise RuntimeError(
            f"the engine ended an answer at {answer.stop_string!r} (seed {answer.seed}), which is not in its text "
            f"({text[-60:]!r}): it decodes the tokens differently"
        )
    return found


def check_answer(answer: Answer, max_tokens: int, stop_ids: Sequence[int]) -> None:
    """Raise RuntimeError if an engine's answer is inconsistent, so that it never reaches a training."""
    ids = answer.response_ids
    stops = [position for position, token in enumerate(ids) if token in stop_ids]
    expected = [len(ids) - 1] if answer.finish_reason == "stop" else []
    problems = {
        f"{len(ids)} tokens instead of 1 to {max_tokens}": not 1 <= len(ids) <= max_tokens,
        f"finish_reason {answer.finish_reason!r} is none of {', '.join(REASONS)}": answer.finish_reason not in REASONS,
        f"finish_reason is {answer.finish_reason!r}, but stop tokens are at {stops} of {len(ids)}": stops != expected,
        f"truncated after {len(ids)} of {max_tokens} tokens": answer.finish_reason == "length"
        and len(ids) != max_tokens,
        f"finish_reason is {answer.finish_reason!r}, but the stop string is {answer.stop_string!r}": (
            answer.finish_reason == "stop_string"
        )
        != (answer.stop_string is not None),
        f"{len(ids)} tokens, but {len(answer.logprobs)} log-probabilities": len(ids) != len(answer.logprobs),
        "a log-probability is not a number between minus infinity and 0": not all(
            math.isfinite(value) and value <= 0 for value in answer.logprobs
        ),
    }
    if found := [problem for problem, present in problems.items() if present]:
        raise RuntimeError(f"the engine returned an inconsistent answer (seed {answer.seed}): {'; '.join(found)}")


def shard_facts(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Counts of one shard, which `summary` sums."""
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    by_string = sum(completion.finish_reason == "stop_string" for completion in completions)
    return {
        "completions": len(completions),
        "stopped": sum(completion.finish_reason != "length" for completion in completions),
        **({"stopped_by_string": by_string} if by_string else {}),
        "response_tokens": sum(len(completion.response_ids) for completion in completions),
        "prompt_tokens": sum(len(rollout.prompt_ids) for rollout in rollouts),
    }


def shard_metrics(facts: dict[str, int], seconds: float) -> dict[str, float]:
    """Metrics of a shard that was sampled in `seconds`; empty if it has no answers."""
    if not facts["completions"]:
        return {}
    means = {name: value for name, value in summary([facts]).items() if isinstance(value, float)}
    return {**means, "tokens_per_second": facts["response_tokens"] / max(seconds, 1e-9)}


def summary(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts of the stage, from those of its shards: counts, mean response length (tokens) and stop rate."""
    names = dict.fromkeys(name for facts in shards for name in facts if name != "failures")
    totals = {name: sum(facts.get(name, 0) for facts in shards) for name in names}
    return {
        **totals,
        "response_length": totals["response_tokens"] / totals["completions"],
        "stop_rate": totals["stopped"] / totals["completions"],
    }
