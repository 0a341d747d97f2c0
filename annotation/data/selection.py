"""The stages `select` and `select-scores`: gather the answers of one training set from several rollouts, and their
scores.

Dynamic sampling selects, from several rounds, the prompts whose answers differ in their scores; replay adds prompts of
earlier iterations.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from contracts.artifacts import Artifact
from contracts.config import StageConfig, identity, input_path
from contracts.errors import UserError
from contracts.fingerprint import digest
from contracts.joining import join
from contracts.jsonl import read_jsonl
from contracts.ledger import Ledger, merge
from contracts.mixture import no_signal_reason
from contracts.records import ROLLOUTS, SCORES, Rollout, Score
from contracts.stage import Context, Outcome

INHERITED_FACTS = ("bos_token_id", "vocabulary", "tokenizer")
"""Facts of rollouts that also hold for a selection from them."""


class SelectConfig(StageConfig):
    """Select prompts with their answers from several published rollouts."""

    stage: ClassVar[str] = "select"
    code_version: ClassVar[int] = 1

    rounds: list[Path] = input_path(min_length=1)
    """Published rollouts of an iteration."""
    scores: list[Path] = input_path(min_length=1)
    """Published scores of each of `rounds`, in the same order."""
    margin: float | None = identity(None, ge=0)
    """Exclude prompts whose best and worst response differ by less in their scores; 0 excludes those whose responses
    all score the same. By default none is excluded."""
    earlier: list[Path] = input_path([])
    """Published rollouts of earlier iterations, the latest first, from which some prompts are replayed."""
    earlier_scores: list[Path] = input_path([])
    """Published scores of each of `earlier`, in the same order."""
    shares: list[Annotated[float, Field(gt=0, le=1)]] = identity([])
    """Share of the prompts to take from each of `earlier`, in the same order."""
    seed: int = identity(0, ge=0)
    """Seed of the selection."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for names in (("rounds", "scores"), ("earlier", "earlier_scores", "shares")):
            counts = [len(getattr(self, name)) for name in names]
            if len(set(counts)) > 1:
                found = ", ".join(f"{count} in {name}" for name, count in zip(names, counts, strict=True))
                raise ValueError(f"these lists must have the same length: {found}.")
        return self


class SelectScoresConfig(StageConfig):
    """Gather the scores of selected answers."""

    stage: ClassVar[str] = "select-scores"
    code_version: ClassVar[int] = 1

    rollouts: Path = input_path()
    """Rollouts that `select` published."""
    rounds: list[Path] = input_path(min_length=1)
    """All rollouts that `select` read."""
    scores: list[Path] = input_path(min_length=1)
    """Published scores of each of `rounds`, in the same order."""
    name: str = identity("reward", min_length=1)
    """Name of the scorer."""


def run(config: SelectConfig, context: Context) -> Outcome:
    """Publish the selected prompts with their answers, one shard for each rollouts artifact that was read."""
    first = Artifact.open(config.rounds[0], ROLLOUTS)
    seen: set[str] = set()
    parts = [_with_signal(config, *paths) for paths in zip(config.rounds, config.scores, strict=True)]
    kept = sum(len(rows) for rows, _ in parts)
    if not kept:
        total = merge((ledger for _, ledger in parts), "prompts")
        raise UserError(
            f"no prompt of {', '.join(map(str, config.rounds))} has answers that score differently: {total}. Sample "
            "more answers or at a higher temperature, lower margin, take other prompts, or use a scorer that tells the "
            "answers apart."
        )
    seen.update(row.prompt_id for rows, _ in parts for row in rows)
    for path, share in zip(config.earlier, config.shares, strict=True):
        rows, ledger = _draw_share(Artifact.open(path, ROLLOUTS), share, config.seed, seen)
        seen.update(row.prompt_id for row in rows)
        parts.append((rows, ledger))
    filled = [(rows, ledger) for rows, ledger in parts if ledger.rows_in]
    for number, (rows, ledger) in enumerate(filled):
        context.publication.write_rows(f"shard-{number:05d}.jsonl", rows, ledger)
    facts = {name: first.manifest.facts[name] for name in INHERITED_FACTS if name in first.manifest.facts}
    facts |= {"replayed": sum(len(rows) for rows, _ in parts) - kept}
    note = ""
    if config.margin is not None:
        wanted = first.manifest.ledger.rows_in
        missing = max(0, wanted - kept)
        facts |= {"wanted": wanted, "missing": missing}
        note = f"{missing} of {wanted} are missing after the last round" if missing else ""
    return Outcome("prompts", facts, first.manifest.weights, note)


def _with_signal(config: SelectConfig, path: Path, scores: Path) -> tuple[list[Rollout], Ledger]:
    """The prompts of one round whose answers' scores differ enough, and a ledger of the others."""
    ledger, rows = Ledger("prompts"), []
    for rollout, found in join(Artifact.open(path, ROLLOUTS), {"scores": Artifact.open(scores, SCORES)}):
        values = [score.score for score in found["scores"].values()]
        lacks = None if config.margin is None else no_signal_reason(values, config.margin)
        if lacks is None:
            ledger.keep()
            rows.append(rollout)
        else:
            ledger.drop(lacks)
    return rows, ledger


def _draw_share(rollouts: Artifact, share: float, seed: int, seen: set[str]) -> tuple[list[Rollout], Ledger]:
    """Draw a share of the prompts of an earlier iteration, without those in `seen`, so that no prompt occurs twice.

    With the same seed, the prompts of a smaller share are a subset of those of a larger one.
    """
    rows = list(rollouts.rows(Rollout))
    order = sorted(range(len(rows)), key=lambda number: digest([seed, rows[number].prompt_id, rows[number].iteration]))
    ledger, kept = Ledger("prompts"), []
    for number in sorted(order[: round(share * len(rows))]):
        if rows[number].prompt_id in seen:
            ledger.drop("answered_again")
        else:
            ledger.keep()
            kept.append(rows[number])
    ledger.drop("not_drawn", len(rows) - ledger.rows_in)
    return kept, ledger


def run_scores(config: SelectScoresConfig, context: Context) -> Outcome:
    """Publish the scores, one shard for each shard of the selected rollouts."""
    rollouts = Artifact.open(config.rollouts, ROLLOUTS)
    first = Artifact.open(config.scores[0], SCORES)
    known = {(rollout.iteration, rollout.prompt_id): scores for rollout, scores in _scored(config)}
    count = sum(map(len, known.values()))
    values: list[float] = []
    for shard in rollouts.shards:
        selected = read_jsonl(shard, Rollout)
        rows = [score for rollout in selected for score in known[rollout.iteration, rollout.prompt_id]]
        values += [score.score for score in rows]
        ledger = Ledger("samples")
        ledger.keep(len(rows))
        if shard == rollouts.shards[-1]:
            ledger.drop("not_selected", count - len(values))
        context.publication.write_rows(shard.name, rows, ledger)
    facts = {"scorer": config.name, "kind": first.manifest.facts.get("kind"), "score_mean": statistics.fmean(values)}
    return Outcome("samples", facts, first.manifest.weights)


def _scored(config: SelectScoresConfig) -> Iterator[tuple[Rollout, list[Score]]]:
    """All prompts with their answers' scores, sorted by sample."""
    for path, scores in zip(config.rounds, config.scores, strict=True):
        for rollout, found in join(Artifact.open(path, ROLLOUTS), {"scores": Artifact.open(scores, SCORES)}):
            yield rollout, [score for _, score in sorted(found["scores"].items())]
