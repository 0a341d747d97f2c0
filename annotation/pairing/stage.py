"""The pairs stage: turns scored rollouts into preference pairs, published as JSONL and as a Parquet dataset."""

import functools
import os
import statistics
from collections.abc import Iterator
from typing import Any

import msgspec

from annotation.data.parquet import PairsParquet, optional_fields_of
from annotation.pairing.choice import BEYOND_LIMIT, Choice, choose
from annotation.pairing.config import PairsConfig
from annotation.pairing.strategies import Candidate, PairPrompt
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fingerprint import digest
from contracts.joining import ScoresBySample, join
from contracts.jsonl import encode, read_jsonl
from contracts.ledger import Ledger
from contracts.records import ROLLOUTS, SCORES, Completion, Pair, Rollout
from contracts.seeds import derive_seed
from contracts.stage import Context, Outcome

SHARD = "shard-00000.jsonl"
DATASET = "train.parquet"
CHECKED_PROMPTS = 16
"""Number of prompts for which a user's own strategy is called twice, to detect randomness and state between calls."""


def run(config: PairsConfig, context: Context) -> Outcome:
    """Choose the pairs of every prompt and publish them; one shard of rollouts is in memory at a time."""
    rollouts = Artifact.open(config.rollouts, ROLLOUTS)
    scores = Artifact.open(config.scores, SCORES)
    _require_several_samples(rollouts)
    publication = context.publication
    ledger = Ledger("pairs")
    summary = Summary()
    bos = rollouts.manifest.facts.get("bos_token_id")
    optional: set[str] = set()
    with context.timed("load"):
        propose = config.load()
    choose_of = functools.partial(
        choose,
        propose=propose,
        margin=config.margin,
        margin_cap=config.margin_cap,
        per_prompt=config.per_prompt,
        distinct=config.distinct,
        what=f"strategy {config.strategy!r}",
        seconds=config.seconds_per_prompt if config.is_own else None,
    )
    total, repeated = int(rollouts.manifest.rows), 0
    with publication.scratch(SHARD).open("wb") as jsonl:
        for rollout, found in join(rollouts, {"scores": scores}):
            candidates = _candidates(config, rollout, found["scores"], bos)
            choice = choose_of(candidates, _prompt_of(config, rollout))
            if config.is_own and summary.prompts < CHECKED_PROMPTS:
                _require_same(choice, choose_of(candidates, _prompt_of(config, rollout)), config, rollout)
            pairs = list(_records(config, rollout, choice.pairs))
            for pair in pairs:
                jsonl.write(encode(pair))
            optional |= optional_fields_of(rollout)
            ledger.keep(len(pairs))
            for reason, count in choice.dropped.items():
                ledger.drop(reason, count)
            summary.add(rollout, found["scores"], candidates, pairs)
            repeated += choice.repeated
            context.progress(summary.prompts, total, "prompts")
        jsonl.flush()
        os.fsync(jsonl.fileno())
    if not ledger.kept:
        raise UserError(
            f"no pair is left of {config.rollouts}: {ledger}. Sample more answers or at a higher temperature, lower "
            "margin, take another strategy, or use a scorer that tells the answers apart."
        )
    ledger.stop_above(config.max_dropped, "pairs", besides=BEYOND_LIMIT)
    with PairsParquet(publication.scratch(DATASET), optional) as dataset:
        dataset.add(read_jsonl(publication.scratch(SHARD), Pair))
    publication.commit(SHARD, ledger, rows=ledger.kept)
    publication.commit(DATASET, Ledger("pairs"))
    facts = summary.facts() | ({"repeated": repeated} if config.distinct else {})
    return Outcome("pairs", facts, rollouts.manifest.weights)


def _require_several_samples(rollouts: Artifact) -> None:
    if all(len(rollout.completions) < 2 for rollout in rollouts.rows(Rollout)):
        raise UserError(
            f"{rollouts.path} holds at most one completion per prompt; a pair needs two. Generate with k=2 or more."
        )


def _require_same(first: Choice, second: Choice, config: PairsConfig, rollout: Rollout) -> None:
    if first != second:
        shown = [[(chosen.sample, rejected.sample) for chosen, rejected in one.pairs] for one in (first, second)]
        raise UserError(
            f"strategy {config.strategy!r}, prompt {rollout.prompt_id}: asked twice about the same candidates, it gave "
            f"{shown[0]!r:.80} and then {shown[1]!r:.80}. Results must be reproducible: draw with "
            "random.Random(prompt.seed), and keep no state between calls."
        )


def _candidates(config: PairsConfig, rollout: Rollout, scores: ScoresBySample, bos: int | None) -> list[Candidate]:
    """The scored completions of a prompt, with the length penalty subtracted from their scores.

    A completion in which the policy sampled BOS is left out, so that no trained sequence has it twice.
    """
    return [
        Candidate(
            completion.sample,
            completion.response_ids,
            scores[completion.sample].score - config.length_penalty * len(completion.response_ids),
            completion.text,
            completion.finish_reason,
            scores[completion.sample].parts or {},
        )
        for completion in rollout.completions
        if completion.sample in scores and bos not in completion.response_ids
    ]


def _prompt_of(config: PairsConfig, rollout: Rollout) -> PairPrompt:
    seed = derive_seed(config.seed, rollout.prompt_id)
    messages = list(msgspec.to_builtins(rollout.messages))
    return PairPrompt(rollout.prompt_id, messages, rollout.answer, list(rollout.tags), seed)


def _records(config: PairsConfig, rollout: Rollout, pairs: list[tuple[Candidate, Candidate]]) -> Iterator[Pair]:
    completions = {completion.sample: completion for completion in rollout.completions}
    prompt = next((message.content for message in reversed(rollout.messages) if message.role == "user"), "")
    for better, worse in pairs:
        chosen, rejected = completions[better.sample], completions[worse.sample]
        yield Pair(
            pair_id=digest([rollout.prompt_id, rollout.iteration, chosen.sample, rejected.sample])[:16],
            prompt_id=rollout.prompt_id,
            prompt=prompt,
            prompt_ids=rollout.prompt_ids,
            chosen_ids=chosen.response_ids,
            rejected_ids=rejected.response_ids,
            chosen=chosen.text,
            rejected=rejected.text,
            chosen_sample=chosen.sample,
            rejected_sample=rejected.sample,
            chosen_finish_reason=chosen.finish_reason,
            rejected_finish_reason=rejected.finish_reason,
            chosen_score=better.score,
            rejected_score=worse.score,
            margin=better.score - worse.score,
            strategy=config.recorded_name,
            iteration=rollout.iteration,
            messages=rollout.messages,
            tools=rollout.tools,
            tags=rollout.tags or msgspec.UNSET,
        )


class Summary:
    """Statistics of the pairs for the report: margins, lengths, truncation, and correlation of reward and length."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[float]] = {
            name: [] for name in ("margin", "chosen_score", "rejected_score", "chosen_tokens", "rejected_tokens")
        }
        self._scores: list[float] = []
        self._lengths: list[float] = []
        self.prompts = 0
        self._samples = 0
        self._scored = 0
        self._truncated = 0

    def add(self, rollout: Rollout, scores: ScoresBySample, candidates: list[Candidate], pairs: list[Pair]) -> None:
        """Count one prompt."""
        self.prompts += 1
        self._samples += len(rollout.completions)
        self._scored += len(scores)
        self._truncated += sum(map(_is_truncated, rollout.completions))
        self._scores += [candidate.score for candidate in candidates]
        self._lengths += [float(len(candidate.response_ids)) for candidate in candidates]
        for pair in pairs:
            self._pairs["margin"].append(pair.margin)
            self._pairs["chosen_score"].append(pair.chosen_score)
            self._pairs["rejected_score"].append(pair.rejected_score)
            self._pairs["chosen_tokens"].append(float(len(pair.chosen_ids)))
            self._pairs["rejected_tokens"].append(float(len(pair.rejected_ids)))

    def facts(self) -> dict[str, Any]:
        """Means over the pairs; the truncation rate and counts are over all completions.

        `reward_length_correlation` is Pearson's correlation between the score that pairs are selected by and the
        length in tokens, over all candidates; None if either is constant.
        """
        correlation = None
        if len(set(self._scores)) > 1 and len(set(self._lengths)) > 1:
            correlation = statistics.correlation(self._scores, self._lengths)
        return {
            **{f"{name}_mean": statistics.fmean(values) for name, values in self._pairs.items()},
            "reward_length_correlation": correlation,
            "truncation_rate": self._truncated / self._samples,
            "samples": self._samples,
            "unscored": self._samples - self._scored,
            "stray_bos": self._scored - len(self._scores),
        }


def _is_truncated(completion: Completion) -> bool:
    return completion.finish_reason == "length"
