"""Rows against rows: whether scores, pairs and experience speak of the samples that were made, and these of the policy.

Everything that was made from one artifact of rollouts is read beside it, one shard of rollouts in memory at a time.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.jsonl import read_jsonl
from contracts.records import EVALUATION, ExperienceRow, Pair, Rollout, Score
from pipelines.lineage.links import Index, is_superseded, links_of

R = TypeVar("R", Pair, ExperienceRow)
EVALUATED = "evaluation.json"
METRICS = "metrics.jsonl"
FIX = "Delete it: the next `pipeline run` writes it again."


def disagreements(
    rollouts: Artifact,
    policy: str | None,
    scores: list[Artifact],
    pairs: list[Artifact],
    experience: list[Artifact],
) -> Iterator[str]:
    """Every way in which rows contradict each other, with the file that is wrong.

    Args:
        policy: fingerprint of the weights that sampled; None: unknown.
        scores: made from these rollouts, with one shard for each of theirs.
        pairs, experience: made from these rollouts, in their order.

    Raises:
        UserError: a line is no valid record, or a file is missing.
    """
    seen: set[str] = set()
    unread: list[_Pairs | _Experience] = [*map(_Pairs, pairs), *map(_Experience, experience)]
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
            if shard.name in {path.name for path in artifact.shards}:
                yield from _scores_of(artifact.path / shard.name, rows)
            else:
                yield f"{artifact.path}: it has no {shard.name}, unlike its rollouts {rollouts.path}"
        for reader in unread:
            yield from reader.compare(rows)
    for reader in unread:
        yield from reader.rest(rollouts)


def _scores_of(shard: Path, rows: dict[str, Rollout]) -> Iterator[str]:
    samples = {
        (rollout.prompt_id, completion.sample): len(completion.response_ids)
        for rollout in rows.values()
        for completion in rollout.completions
    }
    seen: set[tuple[str, int]] = set()
    for score in read_jsonl(shard, Score):
        key = (score.prompt_id, score.sample)
        if key in seen:
            yield f"{shard}: prompt {score.prompt_id}, sample {score.sample} is scored twice"
        elif key not in samples:
            yield f"{shard}: prompt {score.prompt_id}, sample {score.sample} is scored, but was not sampled"
        for numbers in (score.token_logprobs, score.token_values):
            if numbers is not None and len(numbers) != samples.get(key, len(numbers)):
                place = f"{shard}: prompt {score.prompt_id}, sample {score.sample}"
                yield f"{place} has {len(numbers)} numbers for {samples[key]} tokens"
        seen.add(key)


class _Derived(Generic[R]):
    """The rows of one artifact that was made from rollouts, read as far as these have been."""

    kind: type[R]

    def __init__(self, artifact: Artifact) -> None:
        self.path = artifact.shards[0] if artifact.shards else artifact.path
        self._rows: Iterator[R] = artifact.rows(self.kind)
        self._next: R | None = next(self._rows, None)

    def compare(self, rollouts: dict[str, Rollout]) -> Iterator[str]:
        """Compare the rows of these rollouts with them."""
        while self._next is not None and self._next.prompt_id in rollouts:
            yield from self.differences(self._next, rollouts[self._next.prompt_id])
            self._next = next(self._rows, None)

    def rest(self, rollouts: Artifact) -> Iterator[str]:
        """What is left after the last rollout."""
        if self._next is not None:
            yield (
                f"{self.path}: {self.name(self._next)} is of prompt {self._next.prompt_id}, which {rollouts.path} does "
                "not hold at that place"
            )

    def name(self, row: R) -> str:
        """What to call a row."""
        raise NotImplementedError

    def differences(self, row: R, rollout: Rollout) -> Iterator[str]:
        """How a row differs from what was sampled."""
        raise NotImplementedError


class _Pairs(_Derived[Pair]):
    kind = Pair

    def name(self, row: Pair) -> str:
        """By its id."""
        return f"pair {row.pair_id}"

    def differences(self, row: Pair, rollout: Rollout) -> Iterator[str]:
        """In the ids of prompt and answers."""
        where = f"{self.path}: pair {row.pair_id}"
        if row.prompt_ids != rollout.prompt_ids:
            yield f"{where} has other prompt_ids than the rollout of prompt {row.prompt_id}"
        answers = {completion.sample: completion.response_ids for completion in rollout.completions}
        sides = {"chosen": (row.chosen_sample, row.chosen_ids), "rejected": (row.rejected_sample, row.rejected_ids)}
        for side, (sample, ids) in sides.items():
            if answers.get(sample) != ids:
                yield f"{where} has other {side}_ids than sample {sample} of prompt {row.prompt_id}"


class _Experience(_Derived[ExperienceRow]):
    kind = ExperienceRow

    def name(self, row: ExperienceRow) -> str:
        """By its place, as it has no id of its own."""
        return "a row"

    def differences(self, row: ExperienceRow, rollout: Rollout) -> Iterator[str]:
        """In the policy, the ids of prompt and answers, and the numbers of their tokens."""
        where = f"{self.path}: prompt {row.prompt_id}"
        if row.prompt_ids != rollout.prompt_ids:
            yield f"{where} has other prompt_ids than its rollout"
        if row.policy != rollout.policy:
            yield f"{where} names the policy {row.policy[:12]}, but its rollout {rollout.policy[:12]}"
        answers = {completion.sample: completion for completion in rollout.completions}
        for sample in row.samples:
            answer = answers.get(sample.sample)
            if answer is None or answer.response_ids != sample.response_ids:
                yield f"{where}, sample {sample.sample} has other response_ids than its rollout"
                continue
            if answer.logprobs != sample.behaviour:
                yield f"{where}, sample {sample.sample} has another `behaviour` than its rollout has logprobs"
            for name in ("advantages", "reference", "values", "returns"):
                numbers = getattr(sample, name)
                if numbers is not None and len(numbers) != len(sample.response_ids):
                    tokens = f"{len(numbers)} {name} for {len(sample.response_ids)} tokens"
                    yield f"{where}, sample {sample.sample} has {tokens}"


def wrong_metrics(index: Index, artifacts: list[Artifact]) -> Iterator[str]:
    """Where evaluation.json or metrics.jsonl say something else than the manifests of the evaluations."""
    evaluations: dict[Any, Artifact] = {}
    for artifact in artifacts:
        if artifact.manifest.schema == EVALUATION:
            metrics = artifact.manifest.facts.get("metrics", {})
            if json.loads((artifact.path / EVALUATED).read_bytes()) != metrics:
                yield f"{artifact.path / EVALUATED}: it differs from facts.metrics in the manifest"
            if not is_superseded(index.name_of(artifact)):
                evaluations[metrics.get("iteration")] = artifact
    path = index.path / METRICS
    try:
        lines = list(read_jsonl(path, dict)) if path.exists() else []
    except UserError as error:
        yield f"{error} {FIX}"
        return
    for line in lines:
        evaluation = evaluations.get(line.get("iteration"))
        if evaluation is not None:
            yield from _differences(index, path, line, evaluation)
        else:
            yield f"{path}: it has iteration {line.get('iteration')}, but no whole evaluation of it is there"


def _differences(index: Index, path: Path, line: dict[str, Any], evaluation: Artifact) -> Iterator[str]:
    place, metrics = f"{path}: iteration {line['iteration']}", evaluation.manifest.facts["metrics"]
    for name in sorted({*line, *metrics} - {"policy"}):
        if line.get(name) != metrics.get(name):
            yield f"{place}: {name} is {line.get(name)}, but {metrics.get(name)} in {evaluation.path}. {FIX}"
    judged = _policy_of(index, evaluation)
    if judged and index.inner(str(line.get("policy"))) != index.inner(judged):
        yield f"{place}: the policy is {line.get('policy')}, but {judged} in {evaluation.path}. {FIX}"


def _policy_of(index: Index, evaluation: Artifact) -> str | None:
    """The path of the policy that an evaluation judges, if both are known."""
    rollouts = index.input_of(evaluation, "rollouts")
    links = links_of(rollouts.artifact.manifest) if rollouts and rollouts.artifact else []
    return next((link.path for link in links if link.name == "policy"), None)
