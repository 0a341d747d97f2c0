"""The score stage: scores every completion with one scorer, and writes one shard of scores per shard of rollouts."""

import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from annotation.samples import Sample, Scorer, prompt_in_words
from annotation.scorers.base import Opening, RewardScorerSettings, ScoreConfig
from annotation.source_place import source_place
from contracts import entrypoint
from contracts.artifacts import Artifact, model_fingerprint
from contracts.declaration import load
from contracts.errors import UserError
from contracts.faults import FAILED, Fault, Faults
from contracts.following import Source
from contracts.joining import require_made_from
from contracts.ledger import Ledger, merge
from contracts.mixture import SOURCE
from contracts.records import PAIRS, ROLLOUTS, Pair, Rollout, Score
from contracts.stage import Context, Outcome
from contracts.workers import share_shards


def run(config: ScoreConfig, context: Context) -> Outcome:
    """Score the rollouts shard by shard. Replicas share the shards, and finished shards survive a kill."""
    rollouts = Source(config.rollouts, ROLLOUTS)
    wanted = _samples_in_pairs(config, rollouts)

    @functools.cache
    def known() -> dict[str, str]:
        return config.facts_of(rollouts.artifact)

    @functools.cache
    def all_samples() -> int:
        return _count(rollouts.artifact, wanted)

    config.check()
    if rollouts.whole:  # otherwise it is called at the end
        known()

    opened = contextlib.ExitStack()

    def open_worker() -> Callable[[str], None]:
        start = time.perf_counter()
        shard = ""
        opening = Opening(
            context.publication.state, lambda: all_samples() if rollouts.whole else math.inf, lambda: shard
        )
        entrypoint.importing()  # for models, the scorer's imports are most of the stage's
        scorer: Scorer = load(config.opened_by)(config, opening)
        entrypoint.imported()
        opened.callback(getattr(scorer, "close", _nothing))
        seconds = {"load": time.perf_counter() - start}

        def make(name: str) -> None:
            nonlocal shard
            start, shard = time.perf_counter(), name
            samples = _read_samples(rollouts, name, wanted)
            try:
                scores, ledger, faults = _score_samples(config, scorer, samples)
            except UserError as error:
                raise UserError(f"{error}{_place_in(str(error), samples, rollouts)}") from error
            seconds["compute"] = time.perf_counter() - start
            if "wait" in context.seconds:  # recorded even if another process publishes
                seconds["wait"] = context.seconds.pop("wait")
            total = math.fsum(score.score for score in scores)
            facts = {**scorer.facts, "counts": scorer.counts, "score_sum": total, **faults.facts()}
            if unread := getattr(scorer, "unread", ""):
                facts["unread"] = unread
            if parts := {**_sums_of_parts(scores), **_sums_of_sources(samples, scores)}:
                facts["part_sums"] = parts
            if scores:
                speed = len(samples) / max(seconds["compute"], 1e-9)
                context.report_shard(name, {"score_mean": total / len(scores), "samples_per_second": speed})
            context.publication.write_rows(name, scores, ledger, seconds=dict(seconds), facts=facts)
            seconds.clear()

        return make

    replicas = config.replicas_of_shards
    with opened:
        share_shards(context, rollouts, open_worker, replicas=replicas, devices=_devices(replicas, context))
    return _outcome(config, context, known()) if context.publishes else Outcome("samples")


def _nothing() -> None:
    pass


def _place_in(message: str, samples: list[Sample], rollouts: Source) -> str:
    """A sentence that says where the prompt named in an error message is in the user's data, or nothing if unknown."""
    named = next((one.rollout for one in samples if prompt_in_words(one.rollout) in message), None)
    if named is None or not rollouts.whole:
        return ""
    place = source_place(rollouts.artifact, named.prompt_id)
    return "" if place is None else f" The prompt is {place}."


def _samples_in_pairs(config: ScoreConfig, rollouts: Source) -> set[tuple[str, int]] | None:
    """The (prompt_id, sample) keys that occur in the pairs; None: score all samples."""
    if config.pairs is None:
        return None
    pairs = Artifact.open(config.pairs, PAIRS)
    require_made_from(rollouts.artifact, pairs)
    keys: set[tuple[str, int]] = set()
    for pair in pairs.rows(Pair):
        keys |= {(pair.prompt_id, pair.chosen_sample), (pair.prompt_id, pair.rejected_sample)}
    return keys


def _devices(replicas: int, context: Context) -> int:
    """Accelerators per replica."""
    if replicas == 1 or context.role is not None:
        return 0
    from annotation.models.loading import accelerators

    available = accelerators()
    if available and replicas > available:
        raise UserError(f"replicas={replicas}, but only {available} devices are visible. Lower replicas.")
    return 1 if available else 0


def _read_samples(rollouts: Source, shard: str, wanted: set[tuple[str, int]] | None) -> list[Sample]:
    return [
        Sample(rollout, completion)
        for rollout in rollouts.rows(shard, Rollout)
        for completion in rollout.completions
        if wanted is None or (rollout.prompt_id, completion.sample) in wanted
    ]


def _count(rollouts: Artifact, wanted: set[tuple[str, int]] | None) -> int:
    """Number of samples that the stage scores."""
    if wanted is not None:
        return len(wanted)
    return sum(len(rollout.completions) for rollout in rollouts.rows(Rollout))


def _sums_of_sources(samples: list[Sample], scores: list[Score]) -> dict[str, tuple[float, int]]:
    """Sum and count of the scores per prompt set of a mixture, keyed `NAME/score`."""
    sources = {
        sample.rollout.prompt_id: tag.removeprefix(SOURCE)
        for sample in samples
        for tag in sample.rollout.tags
        if tag.startswith(SOURCE)
    }
    found: dict[str, list[float]] = {}
    for score in scores:
        if (source := sources.get(score.prompt_id)) is not None:
            found.setdefault(f"{source}/score", []).append(score.score)
    return {name: (math.fsum(values), len(values)) for name, values in sorted(found.items())}


def _sums_of_parts(scores: list[Score]) -> dict[str, tuple[float, int]]:
    """Sum and count of each part of the scores, by the part's name."""
    found: dict[str, list[float]] = {}
    for score in scores:
        for name, value in (score.parts or {}).items():
            found.setdefault(name, []).append(value)
    return {name: (math.fsum(values), len(values)) for name, values in sorted(found.items())}


def _not_finite(score: Score) -> str | None:
    """A description of the first number in a score that is not finite, or None."""
    parts = {"": score.score, **(score.parts or {})}
    return next((f"{value} as {name or 'score'}" for name, value in parts.items() if not math.isfinite(value)), None)


def _with_penalty(score: Score, penalty: float) -> Score:
    """Subtract the penalty for a truncated response from its score, and from the reward of its last token if tokens
    have rewards."""
    changes: dict[str, Any] = {"score": score.score - penalty}
    if score.token_rewards:
        changes["token_rewards"] = (*score.token_rewards[:-1], score.token_rewards[-1] - penalty)
    return msgspec.structs.replace(score, **changes)


def _score_samples(config: ScoreConfig, scorer: Scorer, samples: list[Sample]) -> tuple[list[Score], Ledger, Faults]:
    """The scores of the samples that could be scored, and a ledger that counts the others by reason."""
    ledger = Ledger("samples")
    faults = Faults(config.fail_on_error)
    penalty = config.missing_eos_penalty if isinstance(config, RewardScorerSettings) else None
    scores: list[Score] = []
    reasons: list[dict[str, Any]] = []
    for sample, score in zip(samples, scorer(samples), strict=True):
        if isinstance(score, Score) and (wrong := _not_finite(score)):
            error = UserError(
                f"scorer {config.name!r} ({config.display_name}) gave {wrong} for {sample}. A score "
                "must be a finite number: fix the function or the model, or try dtype=float32."
            )
            score = Fault(error)
        if isinstance(score, Fault):
            faults.add(score)
            why, score = f"{FAILED}: {score.error}", FAILED
        elif isinstance(score, str):
            why = score
        if isinstance(score, str):
            ledger.drop(score)
            reasons.append({"prompt_id": sample.rollout.prompt_id, "sample": sample.completion.sample, "reason": why})
            continue
        if penalty and sample.completion.finish_reason == "length":
            score = _with_penalty(score, penalty)
        ledger.keep()
        scores.append(score)
    if config.reasons is not None:
        with config.reasons.open("ab") as file:
            file.write(b"".join(msgspec.json.encode(row) + b"\n" for row in reasons))
    return scores, ledger, faults


def _means_of_parts(shards: Iterable[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """NAME_mean of each part over the samples that have it, computed from the sums of all shards."""
    found: dict[str, list[tuple[float, int]]] = {}
    for sums in shards:
        for name, entry in sums.items():
            found.setdefault(name, []).append(entry)
    return {
        f"{name}_mean": math.fsum(total for total, _ in entries) / sum(count for _, count in entries)
        for name, entries in sorted(found.items())
    }


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
    fixes = config.fixes(facts.pop("unread", ""))
    ledger.stop_above(config.max_dropped, f"scorer {config.name!r}", besides=FAILED, fixes=fixes)
    total = math.fsum(receipt.facts["score_sum"] for receipt in receipts)
    facts["score_mean"] = total / ledger.kept if ledger.kept else None
    facts.pop("score_sum", None)
    facts |= _means_of_parts(receipt.facts.get("part_sums", {}) for receipt in receipts)
    facts.pop("part_sums", None)
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt.facts.get("counts", {}))
    facts.pop("counts", None)
    facts |= counts
    facts |= config.summary(counts)
    return Outcome("samples", facts, model_fingerprint(config.model_path) if config.model_path else None)
