"""Joins rollouts with their scores by (`prompt_id`, sample), with one shard in memory at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.jsonl import read_jsonl
from contracts.manifest import MANIFEST
from contracts.records import Rollout, Score

ScoresBySample = dict[int, Score]

IRRELEVANT_KEYS = ("name", "max_dropped", "fail_on_error", "batch_tokens", "dtype", "max_length", "opponents", "date")
"""Keys of a scorer's config that do not change what its scores mean."""


def require_made_from(rollouts: Artifact, derived: Artifact) -> None:
    """Raise UserError unless `derived` (scores or pairs) was made from exactly these rollouts.

    Comparing ids would not be enough: every iteration has samples 0 to K-1 of the same prompts.
    """
    if derived.manifest.inputs.get("rollouts") != rollouts.manifest.digest:
        raise UserError(
            f"{derived.path} ({derived.manifest.schema.name}) was made from other rollouts than {rollouts.path}. "
            "Give the rollouts that it was made from, or recompute it from these."
        )


SCORED_INPUTS = frozenset({"rollouts", "pairs", "against"})
"""Inputs of a scorer that are the data to score."""
COMBINED_INPUT = "scores"
"""The input of a scorer that combines other scores."""


def scorer_of(scores: Artifact) -> list[Any]:
    """Everything that identifies a scorer; the scores of two artifacts are comparable if it is equal.

    For scores that combine others, it includes those scorers, as long as their artifacts still exist at their paths.
    """
    parts = scores.manifest.key_parts
    config = {name: value for name, value in parts.get("config", {}).items() if name not in IRRELEVANT_KEYS}
    inputs: dict[str, Any] = {}
    for name, value in parts.get("inputs", {}).items():
        if name.partition(".")[0] == COMBINED_INPUT:
            place = Path(scores.manifest.input_paths[name])
            inputs[name] = scorer_of(Artifact.open(place)) if (place / MANIFEST).is_file() else None
        elif name not in SCORED_INPUTS:
            inputs[name] = value
    return [config, inputs, parts.get("sources")]


def join(rollouts: Artifact, scores: dict[str, Artifact]) -> Iterator[tuple[Rollout, dict[str, ScoresBySample]]]:
    """Yield each rollout with its scores by scorer name and sample; samples that a scorer dropped are absent there.

    Raises:
        UserError: scores belong to other rollouts, a score has no completion, or a prompt occurs twice.
    """
    for artifact in scores.values():
        require_made_from(rollouts, artifact)
    seen: set[str] = set()
    for shard in rollouts.shards:
        columns = {name: scores_of_shard(artifact, shard.name) for name, artifact in scores.items()}
        for rollout in read_jsonl(shard, Rollout):
            if rollout.prompt_id in seen:
                raise UserError(
                    f"{shard}: prompt {rollout.prompt_id} occurs twice, so its scores cannot be told apart. "
                    "Generate with every prompt once (count no larger than the prompt set)."
                )
            seen.add(rollout.prompt_id)
            found = {name: column.pop(rollout.prompt_id, {}) for name, column in columns.items()}
            samples = {completion.sample for completion in rollout.completions}
            for name, by_sample in found.items():
                if extra := sorted(set(by_sample) - samples):
                    raise UserError(_orphan(scores[name], rollout.prompt_id, extra[0], rollouts))
            yield rollout, found
        for name, column in columns.items():
            for prompt_id, by_sample in column.items():
                raise UserError(_orphan(scores[name], prompt_id, min(by_sample), rollouts))


def _orphan(scores: Artifact, prompt_id: str, sample: int, rollouts: Artifact) -> str:
    return (
        f"{scores.path} scores prompt {prompt_id}, sample {sample}, which {rollouts.path} does not hold there. "
        "Recompute the scores from these rollouts."
    )


def scores_of_shard(scores: Artifact, shard: str) -> dict[str, ScoresBySample]:
    """Read the scores of one shard, by prompt and sample.

    Raises:
        UserError: there is no such shard, or a sample is scored twice.
    """
    column: dict[str, ScoresBySample] = {}
    if shard not in {path.name for path in scores.shards}:
        raise UserError(f"{scores.path} has no {shard}, unlike its rollouts. Recompute the scores.")
    for score in read_jsonl(scores.path / shard, Score):
        by_sample = column.setdefault(score.prompt_id, {})
        if score.sample in by_sample:
            raise UserError(f"{scores.path / shard}: prompt {score.prompt_id}, sample {score.sample} is scored twice.")
        by_sample[score.sample] = score
    return column
