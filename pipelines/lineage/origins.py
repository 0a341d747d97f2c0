"""Where a pair or a prompt comes from: its rows in the artifacts of a run."""

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from contracts.artifacts import Artifact
from contracts.jsonl import open_stored
from contracts.records import (
    CHECKPOINT,
    EXPERIENCE,
    PAIRS,
    PROMPTS,
    ROLLOUTS,
    SCORES,
    Completion,
    ExperienceRow,
    Pair,
    Prompt,
    Rollout,
    Schema,
    Score,
)
from pipelines.lineage.ancestry import ancestry
from pipelines.lineage.links import Found, Index, Link, is_superseded, links_of

RECORDS: dict[Schema, type[Any]] = {
    PAIRS: Pair,
    PROMPTS: Prompt,
    ROLLOUTS: Rollout,
    EXPERIENCE: ExperienceRow,
    SCORES: Score,
}
"""What a row of each is."""
OF_A_PAIR = ("pair_id", "iteration", "chosen_sample", "rejected_sample", "margin")


class OriginRow(NamedTuple):
    """A record, and where it is."""

    artifact: Artifact
    shard: str
    number: int
    """Among all rows of the artifact, from 1."""
    record: Any


class Search:
    """Looks for rows in the artifacts of one run."""

    def __init__(self, index: Index, unread: list[str]) -> None:
        """Files that could not be searched are added to `unread`, with the reason."""
        self.index = index
        self.unread = unread

    def pairs(self, pair_id: str) -> list[dict[str, Any]]:
        """A pair wherever it is; the one that is there now comes before those in superseded/."""
        return [self._pair(row) for row in self._rows(PAIRS, "pair_id", pair_id)]

    def prompt(self, prompt_id: str) -> list[dict[str, Any]]:
        """Where a prompt is from, and all rollouts, pairs and experience of it; empty where there are none."""
        found = {
            "prompts": [
                self._imported(row) | {"messages": msgspec.to_builtins(row.record.messages)}
                for row in self._rows(PROMPTS, "prompt_id", prompt_id)
            ],
            "rollouts": [self._rollout(row) for row in self._rows(ROLLOUTS, "prompt_id", prompt_id)],
            "pairs": [
                {"pairs": self.index.name_of(row.artifact), **{name: getattr(row.record, name) for name in OF_A_PAIR}}
                for row in self._rows(PAIRS, "prompt_id", prompt_id)
            ],
            "experience": [self._experience(row) for row in self._rows(EXPERIENCE, "prompt_id", prompt_id)],
        }
        return [{"run": str(self.index.path), **found}] if any(found.values()) else []

    def _rows(self, schema: Schema, field: str, value: str) -> Iterator[OriginRow]:
        """All rows with this value, those in superseded/ last."""
        for artifact in self._of(schema):
            yield from self._rows_in(artifact, field, value)

    def _row_in(self, found: Found | None, field: str, value: str) -> OriginRow | None:
        """The first row with this value of an artifact that was found."""
        return next(self._rows_in(found.artifact, field, value), None) if found and found.artifact else None

    def _rows_in(self, artifact: Artifact, field: str, value: str, shard: str | None = None) -> Iterator[OriginRow]:
        """The rows of an artifact, or of one shard, with this value; only lines that hold it are decoded."""
        needle, before = msgspec.json.encode(value), 0
        for file in artifact.manifest.files:
            if not file.path.startswith("shard-") or shard not in (None, file.path):
                continue
            path = artifact.path / file.path
            try:
                with open_stored(path) as lines:
                    for number, line in enumerate(lines, before + 1):
                        if needle in line:
                            record = msgspec.json.decode(line, type=RECORDS[artifact.manifest.schema])
                            if getattr(record, field) == value:
                                yield OriginRow(artifact, file.path, number, record)
            except (OSError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
                self.unread.append(f"{path} ({error})")
            before += file.rows

    def _of(self, schema: Schema) -> list[Artifact]:
        return [artifact for artifact in self.index.artifacts.values() if artifact.manifest.schema == schema]

    def _pair(self, row: OriginRow) -> dict[str, Any]:
        """Prompt, answers, scores, policy and use of one pair."""
        index, pair = self.index, row.record
        sampled = self._row_in(index.input_of(row.artifact, "rollouts"), "prompt_id", pair.prompt_id)
        policy = index.input_of(sampled.artifact, "policy") if sampled else None
        labels = index.input_of(row.artifact, "scores")
        answers = {answer["sample"]: answer for answer in self._answers(sampled, row.artifact)} if sampled else {}
        prompt: dict[str, Any] = {"prompt_id": pair.prompt_id, "text": pair.prompt, "messages": None, "from": None}
        if sampled is not None:
            imported = self._row_in(index.input_of(sampled.artifact, "prompts"), "prompt_id", pair.prompt_id)
            prompt["messages"] = msgspec.to_builtins(sampled.record.messages)
            prompt["from"] = self._imported(imported) if imported else None
        sides = {
            side: answers.get(getattr(pair, f"{side}_sample"), {**_sampling_of(None), "scores": {}})
            | {
                "sample": getattr(pair, f"{side}_sample"),
                "text": getattr(pair, side),
                "finish_reason": getattr(pair, f"{side}_finish_reason"),
                "label": getattr(pair, f"{side}_score"),
            }
            for side in ("chosen", "rejected")
        }
        return {
            "run": str(index.path),
            "pairs": index.name_of(row.artifact),
            "row": row.number,
            "iteration": pair.iteration,
            "strategy": pair.strategy,
            "margin": pair.margin,
            "labels": _scorer_of(labels.artifact) if labels and labels.artifact else None,
            "prompt": prompt,
            **sides,
            "rollouts": index.name_of(sampled.artifact) if sampled else None,
            "policy": {
                "weights": sampled.record.policy if sampled else row.artifact.manifest.weights,
                "checkpoint": str(policy.place) if policy else None,
            },
            "used_by": self._used_by(row.artifact),
            "lineage": ancestry(index, policy.artifact) if policy and policy.artifact else None,
        }

    def _imported(self, row: OriginRow) -> dict[str, Any]:
        """Where a prompt was imported from."""
        source = next((link for link in links_of(row.artifact.manifest) if link.name == "source"), None)
        return {
            "prompts": self.index.name_of(row.artifact),
            "row": row.number,
            "source": source.path if source else None,
            "digest": source.digest if source else None,
        }

    def _rollout(self, row: OriginRow) -> dict[str, Any]:
        """One rollout of a prompt: its policy, and its answers with their scores."""
        policy = self.index.input_of(row.artifact, "policy")
        return {
            "rollouts": self.index.name_of(row.artifact),
            "iteration": row.record.iteration,
            "policy": {"weights": row.record.policy, "checkpoint": str(policy.place) if policy else None},
            "messages": msgspec.to_builtins(row.record.messages),
            "answers": list(self._answers(row)),
        }

    def _answers(self, row: OriginRow, pairs: Artifact | None = None) -> Iterator[dict[str, Any]]:
        """The answers of a rollout, how they were sampled, and what each scorer says of them."""
        scores = list(self._scores_of(row, pairs))
        for answer in row.record.completions:
            yield {
                "sample": answer.sample,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                **_sampling_of(answer),
                "scores": {name: values[answer.sample] for name, values in scores if answer.sample in values},
            }

    def _scores_of(self, sampled: OriginRow, pairs: Artifact | None) -> Iterator[tuple[str, dict[int, float]]]:
        """What each scorer says of the samples of a rollout, by sample.

        Of scores that were set aside, only those that the pairs were made from count. A scorer's name that occurs twice
        is followed by its place.
        """
        rollouts, prompt = sampled.artifact.manifest.digest, sampled.record.prompt_id
        read = pairs.manifest.inputs.get("scores") if pairs else None
        names: set[str] = set()
        for artifact in self._of(SCORES):
            manifest, place = artifact.manifest, self.index.name_of(artifact)
            if manifest.inputs.get("rollouts") != rollouts or (is_superseded(place) and manifest.digest != read):
                continue
            rows = self._rows_in(artifact, "prompt_id", prompt, sampled.shard)
            name = _scorer_of(artifact)
            if values := {row.record.sample: row.record.score for row in rows}:
                yield (f"{name} ({place})" if name in names else name), values
            names.add(name)

    def _experience(self, row: OriginRow) -> dict[str, Any]:
        """What was learned from the answers to a prompt, in means over their tokens; and by which checkpoints."""
        return {
            "experience": self.index.name_of(row.artifact),
            "iteration": row.record.iteration,
            "used_by": self._used_by(row.artifact),
            "answers": [
                {
                    "sample": it.sample,
                    "tokens": len(it.response_ids),
                    "reward": it.reward,
                    "advantage": math.fsum(it.advantages) / len(it.advantages),
                    "kl": None if it.reference is None else math.fsum(it.behaviour) - math.fsum(it.reference),
                    "value": None if it.values is None else it.values[0],
                }
                for it in row.record.samples
            ],
        }

    def _used_by(self, artifact: Artifact) -> list[str]:
        """The checkpoints that were trained on an artifact, and not on another one with the same content."""

        def leads_here(links: Iterable[Link]) -> bool:
            found = (self.index.find(link) for link in links if link.digest == artifact.manifest.digest)
            return any(it.artifact is not None and it.artifact.path == artifact.path for it in found)

        return [self.index.name_of(made) for made in self._of(CHECKPOINT) if leads_here(links_of(made.manifest))]


def _sampling_of(answer: Completion | None) -> dict[str, Any]:
    """How an answer was sampled; None where its rollouts are gone."""
    if answer is None:
        return {"tokens": None, "seed": None, "sampling": None, "mean_logprob": None}
    return {
        "tokens": len(answer.response_ids),
        "seed": answer.seed,
        "sampling": msgspec.to_builtins(answer.sampling),
        "mean_logprob": math.fsum(answer.logprobs) / len(answer.logprobs) if answer.logprobs else None,
    }


def _scorer_of(scores: Artifact) -> str:
    """The name that scores are known by."""
    return str(scores.manifest.facts.get("scorer") or scores.manifest.key_parts.get("config", {}).get("name", "score"))
