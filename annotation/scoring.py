"""The score stage: every completion, one scorer, one shard of scores for each shard of rollouts."""

import importlib
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from annotation.config import ScoreConfig
from annotation.samples import Sample, Scorer
from contracts.artifacts import Artifact, model_fingerprint
from contracts.errors import UserError
from contracts.faults import FAILED, Fault, Faults
from contracts.joining import require_made_from
from contracts.jsonl import read_jsonl
from contracts.ledger import Ledger, merge
from contracts.models import ModelInfo
from contracts.records import PAIRS, ROLLOUTS, Pair, Rollout, Score
from contracts.stage import Context, Outcome
from contracts.workers import share_shards

SCORERS = {
    "reward_model": "annotation.reward_model:RewardModel",
    "pairwise": "annotation.pairwise:PairwiseModel",
    "logprobs": "annotation.logprobs:LogprobModel",
    "values": "annotation.values:ValueModel",
}
"""What opens each kind that has a model; imported late, because a rule must start without torch."""


def run(config: ScoreConfig, context: Context) -> Outcome:
    """Score the rollouts shard by shard; shards are shared among replicas and survive a kill."""
    rollouts = Artifact.open(config.rollouts, ROLLOUTS)
    wanted = _samples_in_pairs(config, rollouts)
    open_scorer = _opener(config, context, lambda: _count(rollouts, wanted))
    known = {**_shared_vocabulary(config, rollouts), **_opponents(config, rollouts)}

    def open_worker() -> Callable[[str], None]:
        start = time.perf_counter()
        seconds = {"load": 0.0}
        scorer = open_scorer()
        seconds["load"] = time.perf_counter() - start

        def make(name: str) -> None:
            start = time.perf_counter()
            samples = _read_samples(rollouts, name, wanted)
            scores, ledger, faults = _judge(config, scorer, samples)
            seconds["compute"] = time.perf_counter() - start
            total = math.fsum(score.score for score in scores)
            facts = {**scorer.facts, "counts": scorer.counts, "score_sum": total, **faults.facts()}
            if scores:
                speed = len(samples) / max(seconds["compute"], 1e-9)
                context.report_shard(name, {"score_mean": total / len(scores), "samples_per_second": speed})
            context.publication.write_rows(name, scores, ledger, seconds=dict(seconds), facts=facts)
            seconds["load"] = 0.0

        return make

    sizes = {file.path: file.bytes for file in rollouts.manifest.files}
    largest_first = sorted(rollouts.shards, key=lambda shard: (-sizes[shard.name], shard.name))
    shards = [shard.name for shard in largest_first]
    replicas = 1 if config.kind == "rule" else config.replicas  # its function runs in processes of its own
    share_shards(context, shards, open_worker, replicas=replicas, devices=_devices(config, context))
    return _outcome(config, context, known) if context.publishes else Outcome("samples")


def _samples_in_pairs(config: ScoreConfig, rollouts: Artifact) -> set[tuple[str, int]] | None:
    """The (prompt_id, sample) keys that occur in the pairs, or None for "all"."""
    if config.pairs is None:
        return None
    pairs = Artifact.open(config.pairs, PAIRS)
    require_made_from(rollouts, pairs)
    keys: set[tuple[str, int]] = set()
    for pair in pairs.rows(Pair):
        keys |= {(pair.prompt_id, pair.chosen_sample), (pair.prompt_id, pair.rejected_sample)}
    return keys


def _opener(config: ScoreConfig, context: Context, count: Callable[[], int]) -> Callable[[], Scorer]:
    """Check all that can be checked without loading a model, and return what opens the scorer."""
    if config.kind == "rule":
        from annotation.rule import Rule

        return lambda: Rule(config, context.publication.state, count)
    assert config.model is not None
    info = ModelInfo.read(config.model)
    if config.kind in ("logprobs", "pairwise"):
        info.require_causal()
    elif config.kind == "reward_model" or not info.has_value_head:
        info.require_one_label()
    if config.kind in ("reward_model", "pairwise"):
        info.require_chat_template()
    if config.max_length is not None:
        info.require_length(config.max_length, "max_length")
    longest = config.max_length or info.context_length
    module, _, name = SCORERS[config.kind].partition(":")
    return lambda: getattr(importlib.import_module(module), name)(config, longest)  # type: ignore[no-any-return]


def _shared_vocabulary(config: ScoreConfig, rollouts: Artifact) -> dict[str, str]:
    """For scorers that read the stored ids: the fact that their model means the same by them as the policy.

    Raises:
        UserError: it does not; or, for values, it cannot be known.
    """
    if config.kind not in ("logprobs", "values"):
        return {}
    assert config.model is not None
    policy = rollouts.manifest.facts.get("vocabulary")
    known = policy is not None and ModelInfo.read(config.model).has_tokenizer
    if not known and config.kind == "logprobs":
        return {}
    if policy is None:
        raise UserError(
            f"{rollouts.path} does not say by which vocabulary its token ids are to be read (its manifest has no fact "
            "`vocabulary`), so nobody can tell whether the critic reads them as they are meant. Generate the rollouts "
            "again."
        )
    if not known:
        raise UserError(
            f"critic {config.model} has no tokenizer, so nobody can tell whether it reads the rollouts' token ids as "
            "they are meant. Save the tokenizer of the model that it was made from into it, with save_pretrained."
        )
    from contracts.chat import ChatTokenizer

    found = ChatTokenizer(config.model).vocabulary
    if found != policy:
        raise UserError(
            f"{config.model} has another vocabulary ({found[:12]}) than the policy that sampled {rollouts.path} "
            f"({policy[:12]}): the same token ids mean other text to it. Take a model of the policy's."
        )
    return {"vocabulary": found}


def _opponents(config: ScoreConfig, rollouts: Artifact) -> dict[str, str]:
    """For the kind pairwise: the fact whose answers the samples are compared with, where these are not their own.

    Raises:
        UserError: there is nothing to compare them with.
    """
    if config.kind != "pairwise":
        return {}
    if config.against is not None:
        return {"against": Artifact.open(config.against, ROLLOUTS).manifest.digest}
    if all(len(rollout.completions) < 2 for rollout in rollouts.rows(Rollout)):
        raise UserError(
            f"kind=pairwise compares the answers to a prompt with each other, but {rollouts.path} holds at most one "
            "per prompt. Generate with k=2 or more, or set against=ROLLOUTS to compare with another policy's answers."
        )
    return {}


def _devices(config: ScoreConfig, context: Context) -> int:
    """Accelerators per replica."""
    if config.kind == "rule" or config.replicas == 1 or context.role is not None:
        return 0
    from annotation.loading import accelerators

    available = accelerators()
    if available and config.replicas > available:
        raise UserError(f"replicas={config.replicas}, but only {available} devices are visible. Lower replicas.")
    return 1 if available else 0


def _read_samples(rollouts: Artifact, shard: str, wanted: set[tuple[str, int]] | None) -> list[Sample]:
    return [
        Sample(rollout, completion)
        for rollout in read_jsonl(rollouts.path / shard, Rollout)
        for completion in rollout.completions
        if wanted is None or (rollout.prompt_id, completion.sample) in wanted
    ]


def _count(rollouts: Artifact, wanted: set[tuple[str, int]] | None) -> int:
    """How many samples the stage judges."""
    if wanted is not None:
        return len(wanted)
    return sum(len(rollout.completions) for rollout in rollouts.rows(Rollout))


def _penalised(score: Score, penalty: float) -> Score:
    """A score less the penalty of an answer without an end, which its last token pays where tokens have rewards."""
    changes: dict[str, Any] = {"score": score.score - penalty}
    if score.token_rewards:
        changes["token_rewards"] = (*score.token_rewards[:-1], score.token_rewards[-1] - penalty)
    return msgspec.structs.replace(score, **changes)


def _judge(config: ScoreConfig, scorer: Scorer, samples: list[Sample]) -> tuple[list[Score], Ledger, Faults]:
    """Scores of the samples that could be judged, and the count of the others by reason."""
    ledger = Ledger("samples")
    faults = Faults(config.fail_on_error)
    scores: list[Score] = []
    for sample, score in zip(samples, scorer(samples), strict=True):
        if isinstance(score, Score) and not math.isfinite(score.score):
            error = UserError(
                f"scorer {config.name!r} ({config.function or config.model}) gave {score.score} for {sample}. A score "
                "must be a finite number: fix the function or the model, or try dtype=float32."
            )
            score = Fault(error)
        if isinstance(score, Fault):
            faults.add(score)
            score = FAILED
        if isinstance(score, str):
            ledger.drop(score)
            continue
        if config.missing_eos_penalty and sample.completion.finish_reason == "length":
            score = _penalised(score, config.missing_eos_penalty)
        ledger.keep()
        scores.append(score)
    return scores, ledger, faults


def _outcome(config: ScoreConfig, context: Context, known: dict[str, Any]) -> Outcome:
    receipts = context.publication.receipts().values()
    ledger = merge((receipt.ledger for receipt in receipts), "samples")
    faults = Faults(config.fail_on_error)
    facts: dict[str, Any] = {"scorer": config.name, "kind": config.kind, **known}
    for receipt in receipts:
        facts |= receipt.facts
        faults.messages += receipt.facts.get("failures", [])
    faults.require_few(ledger)
    facts |= faults.facts()
    ledger.stop_above(config.max_dropped, f"scorer {config.name!r}", besides=FAILED)
    total = math.fsum(receipt.facts["score_sum"] for receipt in receipts)
    facts["score_mean"] = total / ledger.kept if ledger.kept else None
    facts.pop("score_sum", None)
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt.facts.get("counts", {}))
    facts.pop("counts", None)
    facts |= counts
    if config.kind == "pairwise":
        facts["consistency"] = counts["consistent"] / counts["comparisons"] if counts["comparisons"] else None
    return Outcome("samples", facts, model_fingerprint(config.model) if config.model else None)
