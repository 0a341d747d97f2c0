"""Finds the provenance of a pair or a prompt: its rows in the artifacts of a run."""

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
from pipelines.lineage.links import Index, Link, ResolvedLink, is_superseded, links_of

RECORDS: dict[Schema, type[Any]] = {
    PAIRS: Pair,
    PROMPTS: Prompt,
    ROLLOUTS: Rollout,
    EXPERIENCE: ExperienceRow,
    SCORES: Score,
}
"""Record type of the rows, by schema."""
PAIR_FIELDS = ("pair_id", "iteration", "chosen_sample", "rejected_sample", "margin")
COPYING_STAGES = {"select": ("rounds", "earlier"), "draw": ("sources",)}
"""Stages that publish rows of other stages unchanged, with the inputs that these rows come from."""


class OriginRow(NamedTuple):
    """A record and its location."""

    artifact: Artifact
    shard: str
    number: int
    """The row's number among all rows of the artifact, from 1."""
    record: Any


class Search:
    """Searches the artifacts of one run for rows."""

    def __init__(self, index: Index, unread: list[str]) -> None:
        """Files that cannot be searched are appended to `unread`, with the reason."""
        self.index = index
        self.unread = unread

    def pairs(self, pair_id: str) -> list[dict[str, Any]]:
        """All occurrences of a pair, those in superseded/ last."""
        return [self._pair(row) for row in self._rows(PAIRS, "pair_id", pair_id)]

    def prompt(self, prompt_id: str) -> list[dict[str, Any]]:
        """A prompt's source, rollouts, pairs and experience; empty if the run does not have it."""
        found = {
            "prompts": [
                self._imported(row) | {"messages": msgspec.to_builtins(row.record.messages)}
                for row in self._rows(PROMPTS, "prompt_id", prompt_id)
                if not self._copied_inputs(row)
            ],
            "rollouts": [self._rollout(row) for row in self._rows(ROLLOUTS, "prompt_id", prompt_id)],
            "pairs": [
                {"pairs": self.index.name_of(row.artifact), **{name: getattr(row.record, name) for name in PAIR_FIELDS}}
                for row in self._rows(PAIRS, "prompt_id", prompt_id)
            ],
            "experience": [self._experience(row) for row in self._rows(EXPERIENCE, "prompt_id", prompt_id)],
        }
        return [{"run": str(self.index.path), **found}] if any(found.values()) else []

    def _rows(self, schema: Schema, field: str, value: str) -> Iterator[OriginRow]:
        """All rows with this value, those in superseded/ last."""
        for artifact in self._of(schema):
            yield from self._rows_in(artifact, field, value)

    def _row_in(self, found: ResolvedLink | None, field: str, value: str) -> OriginRow | None:
        """The first row with this value in an artifact that was found."""
        return next(self._rows_in(found.artifact, field, value), None) if found and found.artifact else None

    def _original_row(self, row: OriginRow) -> OriginRow:
        """The row in the artifact where it was made, for a row that a stage has copied (`COPYING_STAGES`)."""
        links = [link for link in links_of(row.artifact.manifest) if link.name.startswith(self._copied_inputs(row))]
        for found in map(self.index.find, links):
            usable = found if found.state in ("same", "replaced") else None
            source = self._row_in(usable, "prompt_id", row.record.prompt_id)
            if source is not None and getattr(source.record, "iteration", None) == getattr(
                row.record, "iteration", None
            ):
                return self._original_row(source)
        return row

    @staticmethod
    def _copied_inputs(row: OriginRow) -> tuple[str, ...]:
        return COPYING_STAGES.get(row.artifact.manifest.stage, ())

    def _rows_in(self, artifact: Artifact, field: str, value: str, shard: str | None = None) -> Iterator[OriginRow]:
        """The rows of an artifact, or of one shard, with this value; only lines that contain it are decoded."""
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
        """Prompt, responses, scores and policy of a pair, and the checkpoints trained on it."""
        index, pair = self.index, row.record
        sampled = self._row_in(index.input_of(row.artifact, "rollouts"), "prompt_id", pair.prompt_id)
        origin = self._original_row(sampled) if sampled else None
        policy = index.input_of(origin.artifact, "policy") if origin else None
        labels = index.input_of(row.artifact, "scores")
        answers = {answer["sample"]: answer for answer in self._answers(sampled, row.artifact)} if sampled else {}
        prompt: dict[str, Any] = {"prompt_id": pair.prompt_id, "text": pair.prompt, "messages": None, "from": None}
        if origin is not None:
            imported = self._row_in(index.input_of(origin.artifact, "prompts"), "prompt_id", pair.prompt_id)
            prompt["messages"] = msgspec.to_builtins(origin.record.messages)
            prompt["from"] = self._imported(self._original_row(imported)) if imported else None
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
            "rollouts": index.name_of(origin.artifact) if origin else None,
            "policy": {
                "weights": sampled.record.policy if sampled else row.artifact.manifest.weights,
                "checkpoint": str(policy.place) if policy else None,
            },
            "used_by": self._used_by(row.artifact),
            "lineage": ancestry(index, policy.artifact) if policy and policy.artifact else None,
        }

    def _imported(self, row: OriginRow) -> dict[str, Any]:
        """The imported row and source of a prompt."""
        source = next((link for link in links_of(row.artifact.manifest) if link.name == "source"), None)
        return {
            "prompts": self.index.name_of(row.artifact),
            "row": row.number,
            "source": source.path if source else None,
            "digest": source.digest if source else None,
        }

    def _rollout(self, row: OriginRow) -> dict[str, Any]:
        """A rollout with its policy, responses and scores."""
        policy = self.index.input_of(self._original_row(row).artifact, "policy")
        return {
            "rollouts": self.index.name_of(row.artifact),
            "iteration": row.record.iteration,
            "policy": {"weights": row.record.policy, "checkpoint": str(policy.place) if policy else None},
            "messages": msgspec.to_builtins(row.record.messages),
            "answers": list(self._answers(row)),
        }

    def _answers(self, row: OriginRow, pairs: Artifact | None = None) -> Iterator[dict[str, Any]]:
        """The responses of a rollout with their sampling parameters and scores."""
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
        """The scores of a rollout by each scorer, by sample.

        Scores in superseded/ count only if the pairs were chosen by them. If a scorer's name occurs twice, its artifact
        is added to the name.
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
        """A prompt's experience, in means over tokens, and the checkpoints trained on it."""
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
        """The checkpoints trained on this artifact, without those trained on another one with the same content."""

        def leads_here(links: Iterable[Link]) -> bool:
            found = (self.index.find(link) for link in links if link.digest == artifact.manifest.digest)
            return any(it.artifact is not None and it.artifact.path == artifact.path for it in found)

        return [self.index.name_of(made) for made in self._of(CHECKPOINT) if leads_here(links_of(made.manifest))]


def _sampling_of(answer: Completion | None) -> dict[str, Any]:
    """The sampling parameters and statistics of a response; values are None if its rollouts are gone."""
    if answer is None:
        return {"tokens": None, "seed": None, "sampling": None, "mean_logprob": None}
    return {
        "tokens": len(answer.response_ids),
        "seed": answer.seed,
        "sampling": msgspec.to_builtins(answer.sampling),
        "mean_logprob": math.fsum(answer.logprobs) / len(answer.logprobs) if answer.logprobs else None,
    }


def _scorer_of(scores: Artifact) -> str:
    """The name of the scorer of these scores."""
    return str(scores.manifest.facts.get("scorer") or scores.manifest.key_parts.get("config", {}).get("name", "score"))
