"""Cross-checks rows: scores, pairs and experience against their rollouts, and rollouts against their policy.

All artifacts derived from the same rollouts are read in parallel with them, one shard of rollouts in memory at a time.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.jsonl import read_jsonl
from contracts.points import METRICS, Point
from contracts.records import EVALUATION, EXPERIENCE, PAIRS, SCORES, ExperienceRow, Pair, Rollout, Schema, Score
from pipelines.lineage.links import Index, is_superseded
from pipelines.run.points import EVAL, is_evaluation, latest

FIX = "Delete it: the next `pipeline run` writes it again."


def contradictions(rollouts: Artifact, policy: str | None, derived: list[Artifact]) -> Iterator[str]:
    """All contradictions between rows, each with the file that is wrong.

    Args:
        policy: fingerprint of the weights that sampled; None if unknown.
        derived: artifacts made from these rollouts: scores, shard by shard; pairs and experience, in their order.

    Raises:
        UserError: a line is no valid record, or a file is missing.
    """
    seen: set[str] = set()
    scores = [artifact for artifact in derived if artifact.manifest.schema == SCORES]
    readers = [_Reader(artifact) for artifact in derived if artifact.manifest.schema in COMPARISONS]
    for shard in rollouts.shards:
        rows: dict[str, Rollout] = {}
        for rollout in read_jsonl(shard, Rollout):
            if rollout.prompt_id in seen:
                yield f"{shard}: prompt {rollout.prompt_id} occurs twice"
            if policy is not None and rollout.policy != policy:
                yield (
                    f"{shard}: prompt {rollout.prompt_id} names the policy {rollout.policy[:12]}, but the one that was "
                    f"read is {policy[:12]}"
                )
            seen.add(rollout.prompt_id)
            rows[rollout.prompt_id] = rollout
        for artifact in scores:
            if artifact.path / shard.name in artifact.shards:
                yield from _scores_of(artifact.path / shard.name, rows)
            else:
                yield f"{artifact.path}: it has no {shard.name}, unlike its rollouts {rollouts.path}"
        for reader in readers:
            yield from reader.compare(rows)
    for reader in readers:
        if (row := reader.next) is not None:
            what = f"pair {row.pair_id}" if isinstance(row, Pair) else "a row"
            place = f"which {rollouts.path} does not have at that position"
            yield f"{reader.path}: {what} is of prompt {row.prompt_id}, {place}"


def _scores_of(shard: Path, rows: dict[str, Rollout]) -> Iterator[str]:
    samples = {
        (rollout.prompt_id, completion.sample): len(completion.response_ids)
        for rollout in rows.values()
        for completion in rollout.completions
    }
    seen: set[tuple[str, int]] = set()
    for score in read_jsonl(shard, Score):
        key = (score.prompt_id, score.sample)
        place = f"{shard}: prompt {score.prompt_id}, sample {score.sample}"
        if key in seen:
            yield f"{place} is scored twice"
        elif key not in samples:
            yield f"{place} is scored, but was not sampled"
        for numbers in (score.token_logprobs, score.token_values):
            if numbers is not None and len(numbers) != samples.get(key, len(numbers)):
                yield f"{place} has {len(numbers)} numbers for {samples[key]} tokens"
        seen.add(key)


class _Reader:
    """Reads pairs or experience in step with the rollouts that they were made from."""

    def __init__(self, artifact: Artifact) -> None:
        self.path = artifact.shards[0] if artifact.shards else artifact.path
        record_type, self._differences = COMPARISONS[artifact.manifest.schema]
        self._rows = artifact.rows(record_type)
        self.next = next(self._rows, None)

    def compare(self, rollouts: dict[str, Rollout]) -> Iterator[str]:
        """The contradictions between these rollouts and the rows made from them."""
        while self.next is not None and (rollout := rollouts.get(self.next.prompt_id)) is not None:
            yield from (f"{self.path}: {text}" for text in self._differences(self.next, rollout))
            self.next = next(self._rows, None)


def _pair_differences(pair: Pair, rollout: Rollout) -> Iterator[str]:
    """Compare the token ids of prompt and responses."""
    if pair.prompt_ids != rollout.prompt_ids:
        yield f"pair {pair.pair_id} has other prompt_ids than the rollout of prompt {pair.prompt_id}"
    answers = {completion.sample: completion.response_ids for completion in rollout.completions}
    sides = {"chosen": (pair.chosen_sample, pair.chosen_ids), "rejected": (pair.rejected_sample, pair.rejected_ids)}
    for side, (sample, ids) in sides.items():
        if answers.get(sample) != ids:
            yield f"pair {pair.pair_id} has other {side}_ids than sample {sample} of prompt {pair.prompt_id}"


def _experience_differences(row: ExperienceRow, rollout: Rollout) -> Iterator[str]:
    """Compare the policy, the token ids of prompt and responses, and the lengths of per-token values."""
    prompt = f"prompt {row.prompt_id}"
    if row.prompt_ids != rollout.prompt_ids:
        yield f"{prompt} has other prompt_ids than its rollout"
    if row.policy != rollout.policy:
        yield f"{prompt} names the policy {row.policy[:12]}, but its rollout {rollout.policy[:12]}"
    answers = {completion.sample: completion for completion in rollout.completions}
    for sample in row.samples:
        place = f"{prompt}, sample {sample.sample}"
        answer = answers.get(sample.sample)
        if answer is None or answer.response_ids != sample.response_ids:
            yield f"{place} has other response_ids than its rollout"
            continue
        if answer.logprobs != sample.behaviour:
            yield f"{place} has another `behaviour` than its rollout has logprobs"
        for name in ("advantages", "reference", "values", "returns"):
            numbers = getattr(sample, name)
            if numbers is not None and len(numbers) != len(sample.response_ids):
                yield f"{place} has {len(numbers)} {name} for {len(sample.response_ids)} tokens"


COMPARISONS: dict[Schema, tuple[type[Any], Callable[[Any, Rollout], Iterator[str]]]] = {
    PAIRS: (Pair, _pair_differences),
    EXPERIENCE: (ExperienceRow, _experience_differences),
}
"""Record type and comparison with the rollout, by schema."""


def metric_mismatches(index: Index, artifacts: list[Artifact]) -> Iterator[str]:
    """Differences between evaluation.json or metrics.jsonl and the manifests of the evaluations."""
    evaluations: dict[str, Artifact] = {}
    for artifact in artifacts:
        if artifact.manifest.schema == EVALUATION:
            file = artifact.path / "evaluation.json"
            if json.loads(file.read_bytes()) != artifact.manifest.facts.get("metrics", {}):
                yield f"{file}: it differs from facts.metrics in the manifest"
            if not is_superseded(name := index.name_of(artifact)):
                evaluations[name] = artifact
    path = index.path / METRICS
    try:
        points = list(read_jsonl(path, Point)) if path.exists() else []
    except UserError as error:
        yield f"{error} {FIX}"
        return
    for name, own in latest(points).items():
        evaluation = evaluations.get(name)
        if evaluation is not None:
            yield from _differences(path, own[-1], evaluation)
        elif is_evaluation(own[-1]):
            yield f"{path}: it has metrics of {name}, but its evaluation is missing or damaged"


def _differences(path: Path, point: Point, evaluation: Artifact) -> Iterator[str]:
    metrics = evaluation.manifest.facts["metrics"]
    if not evaluation.manifest.key.startswith(point.key):
        yield f"{path}: its last metrics of {point.stage} are of the key {point.key}, not of {evaluation.path}. {FIX}"
        return
    for name, value in metrics.items():
        if isinstance(value, int | float) and name != "iteration" and point.metrics.get(EVAL + name) != value:
            found = point.metrics.get(EVAL + name)
            yield f"{path}: {point.stage}: {EVAL}{name} is {found}, but {value} in {evaluation.path}. {FIX}"
