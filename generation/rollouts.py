"""From prompts to requests, and from answers to the published records. Pure functions."""

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from contracts.chat import ChatTokenizer
from contracts.faults import FAILED, Fault, Faults
from contracts.ledger import Ledger
from contracts.records import Completion, Prompt, Rollout, Sampling
from contracts.seeds import derive_seed
from generation.config import GenerationConfig
from generation.engine import Answer, GenerationRequest, SamplingEngine


class Shard(msgspec.Struct, frozen=True):
    """Consecutive prompts that are sampled as one batch and published as one file."""

    name: str
    prompts: tuple[tuple[Prompt, tuple[int, ...]], ...]
    """The prompts that fit, with their token ids."""
    ledger: Ledger


def default_shard_size(config: GenerationConfig) -> int:
    """Prompts per shard: eight full batches of samples, so that the tail of the last one costs little.

    It depends on what the stage computes alone, never on the machine: the shard decides what is batched with what,
    and so the last bits of the results.
    """
    return max(1, 8 * config.max_num_seqs // config.k)


def cut(prompts: Sequence[tuple[Prompt, tuple[int, ...]]], size: int, longest: int | None) -> list[Shard]:
    """Cut the prompts into shards of `size` (the last one has the rest); drop those of more than `longest` tokens."""
    shards = []
    for number, start in enumerate(range(0, len(prompts), size)):
        chunk = prompts[start : start + size]
        kept = tuple((prompt, ids) for prompt, ids in chunk if longest is None or len(ids) <= longest)
        ledger = Ledger("prompts")
        ledger.keep(len(kept))
        ledger.drop("too_long", len(chunk) - len(kept))
        shards.append(Shard(f"shard-{number:05}.jsonl", kept, ledger))
    return shards


def requests_of(prompt: Prompt, ids: tuple[int, ...], config: GenerationConfig) -> list[GenerationRequest]:
    """One request per temperature, each for its part of the K answers."""
    requests = []
    for group, temperature in enumerate(config.temperatures):
        greedy = temperature == 0
        sampling = Sampling(
            temperature=temperature,
            top_p=1.0 if greedy else config.top_p,
            top_k=0 if greedy else config.top_k,
            max_tokens=config.max_new_tokens,
        )
        seed = derive_seed(config.seed, config.iteration, prompt.prompt_id, group)
        requests.append(GenerationRequest(ids, config.k // len(config.temperatures), seed, sampling))
    return requests


def sample_shard(
    shard: Shard, engine: SamplingEngine, tokenizer: ChatTokenizer, config: GenerationConfig, policy: str
) -> tuple[list[Rollout], Ledger, Faults]:
    """Sample one shard; the rows are in the order of the prompts, without those that failed.

    Args:
        policy: fingerprint of the weights in `engine`.
    """
    # Long prompts first: their prefill is dear, and what is left at the end should be short.
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
            completions = _completions(requests[mine], answers[mine], tokenizer)
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
    requests: Sequence[GenerationRequest], answers: Sequence[Sequence[Answer] | Fault], tokenizer: ChatTokenizer
) -> tuple[Completion, ...]:
    completions: list[Completion] = []
    for request, group in zip(requests, answers, strict=True):
        if isinstance(group, Fault):
            raise group.error
        if len(group) != request.n:
            raise RuntimeError(f"{request.n} answers were asked for, but the engine gave {len(group)}")
        for answer in group:
            check_answer(answer, request.sampling.max_tokens, tokenizer.stop_ids)
            completions.append(
                Completion(
                    sample=len(completions),
                    response_ids=answer.response_ids,
                    text=tokenizer.text(answer.response_ids),
                    finish_reason=answer.finish_reason,
                    logprobs=answer.logprobs,
                    seed=answer.seed,
                    sampling=request.sampling,
                )
            )
    return tuple(completions)


def check_answer(answer: Answer, max_tokens: int, stop_ids: Sequence[int]) -> None:
    """Raise RuntimeError where an engine's answer contradicts itself: nothing of that kind may reach a trainer."""
    ids = answer.response_ids
    stops = [position for position, token in enumerate(ids) if token in stop_ids]
    expected = [len(ids) - 1] if answer.finish_reason == "stop" else []
    problems = {
        f"{len(ids)} tokens where 1 to {max_tokens} were asked for": not 1 <= len(ids) <= max_tokens,
        f"finish_reason {answer.finish_reason!r} is neither stop nor length": answer.finish_reason
        not in ("stop", "length"),
        f"finish_reason is {answer.finish_reason!r}, but stop tokens are at {stops} of {len(ids)}": stops != expected,
        f"truncated after {len(ids)} of {max_tokens} tokens": answer.finish_reason == "length"
        and len(ids) != max_tokens,
        f"{len(ids)} tokens, but {len(answer.logprobs)} log-probabilities": len(ids) != len(answer.logprobs),
        "a log-probability is not a number between minus infinity and 0": not all(
            math.isfinite(value) and value <= 0 for value in answer.logprobs
        ),
    }
    if found := [problem for problem, present in problems.items() if present]:
        raise RuntimeError(f"the engine gave an inconsistent answer (seed {answer.seed}): {'; '.join(found)}")


def shard_facts(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Counts of one shard, which `summary` adds up."""
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    return {
        "completions": len(completions),
        "stopped": sum(completion.finish_reason == "stop" for completion in completions),
        "response_tokens": sum(len(completion.response_ids) for completion in completions),
        "prompt_tokens": sum(len(rollout.prompt_ids) for rollout in rollouts),
    }


def shard_metrics(facts: dict[str, int], seconds: float) -> dict[str, float]:
    """The metrics of one shard that was sampled in `seconds`; none where it has no answer."""
    if not facts["completions"]:
        return {}
    means = {name: value for name, value in summary([facts]).items() if isinstance(value, float)}
    return {**means, "tokens_per_second": facts["response_tokens"] / max(seconds, 1e-9)}


def summary(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The stage's facts from those of its shards: counts, mean response length (tokens) and stop rate."""
    totals = {name: sum(facts[name] for facts in shards) for name in shards[0] if name != "failures"}
    return {
        **totals,
        "response_length": totals["response_tokens"] / totals["completions"],
        "stop_rate": totals["stopped"] / totals["completions"],
    }
