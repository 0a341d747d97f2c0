"""Where a pair or a prompt comes from: its rows in the artifacts of a run."""

import gzip
import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

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
from pipelines.lineage.links import Index, Link, is_superseded, links_of

R = TypeVar("R")
Unread = list[str]
"""Files that could not be searched, with the reason."""


class OriginRow(NamedTuple):
    """A record, and where it is."""

    artifact: Artifact
    shard: str
    number: int
    """Among all rows of the artifact, from 1."""
    record: Any


def rows_with(
    artifact: Artifact, kind: type[R], text: str, unread: Unread, shard: str | None = None
) -> Iterator[OriginRow]:
    """The rows that hold a string; only these are decoded. Files that cannot be read are added to `unread`."""
    needle = msgspec.json.encode(text)
    before = 0
    for file in artifact.manifest.files:
        if not file.path.startswith("shard-") or shard not in (None, file.path):
            continue
        path = artifact.path / file.path
        try:
            with open_stored(path) as lines:
                for number, line in enumerate(lines, before + 1):
                    if needle in line:
                        yield OriginRow(artifact, file.path, number, msgspec.json.decode(line, type=kind))
        except (OSError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
            unread.append(f"{path} ({error})")
        before += file.rows


def pair_origins(indexes: list[Index], pair_id: str, unread: Unread) -> dict[str, Any] | None:
    """A pair in all runs that have it; in each the one that is there now comes before those in superseded/."""
    found = [
        pair_origin(index, row, unread)
        for index in indexes
        for artifact in of_schema(index, PAIRS)
        for row in rows_with(artifact, Pair, pair_id, unread)
        if row.record.pair_id == pair_id
    ]
    return {"kind": "pair", "pair_id": pair_id, "found": found} if found else None


def pair_origin(index: Index, row: OriginRow, unread: Unread) -> dict[str, Any]:
    """Prompt, answers, scores, policy and use of one pair."""
    pair: Pair = row.record
    rollouts = index.input_of(row.artifact, "rollouts")
    sampled = find_row(rollouts.artifact, Rollout, "prompt_id", pair.prompt_id, unread) if rollouts else None
    policy = index.input_of(sampled.artifact, "policy") if sampled else None
    answers = {completion.sample: completion for completion in sampled.record.completions} if sampled else {}
    scores = list(scores_of(index, sampled, row.artifact, unread)) if sampled else []
    sides = {
        side: {
            "sample": sample,
            "text": text,
            "finish_reason": reason,
            "label": label,
            **sampling_of(answers.get(sample)),
            "scores": {name: values[sample] for name, values in scores if sample in values},
        }
        for side, sample, text, reason, label in (
            ("chosen", pair.chosen_sample, pair.chosen, pair.chosen_finish_reason, pair.chosen_score),
            ("rejected", pair.rejected_sample, pair.rejected, pair.rejected_finish_reason, pair.rejected_score),
        )
    }
    return {
        "run": str(index.path),
        "pairs": index.name_of(row.artifact),
        "row": row.number,
        "iteration": pair.iteration,
        "strategy": pair.strategy,
        "margin": pair.margin,
        "labels": scorer_of(index, row.artifact),
        "prompt": prompt_origin(index, sampled, pair, unread),
        **sides,
        "rollouts": index.name_of(sampled.artifact) if sampled else None,
        "policy": {
            "weights": sampled.record.policy if sampled else row.artifact.manifest.weights,
            "checkpoint": str(policy.place) if policy else None,
        },
        "used_by": used_by(index, row.artifact),
        "lineage": ancestry(index, policy.artifact) if policy and policy.artifact else None,
    }


def reads(index: Index, link: Link, artifact: Artifact) -> bool:
    """Whether a link leads to an artifact, and not to another one with the same content."""
    if link.digest != artifact.manifest.digest:
        return False
    found = index.find(link).artifact
    return found is not None and found.path == artifact.path


def prompt_origin(index: Index, sampled: OriginRow | None, pair: Pair, unread: Unread) -> dict[str, Any]:
    """A pair's prompt, and where it came from."""
    origin: dict[str, Any] = {"prompt_id": pair.prompt_id, "text": pair.prompt, "messages": None, "from": None}
    if sampled is None:
        return origin
    origin["messages"] = msgspec.to_builtins(sampled.record.messages)
    prompts = index.input_of(sampled.artifact, "prompts")
    row = find_row(prompts.artifact, Prompt, "prompt_id", pair.prompt_id, unread) if prompts else None
    return {**origin, "from": imported_from(index, row) if row else None}


def imported_from(index: Index, row: OriginRow) -> dict[str, Any]:
    """Where a prompt was imported from."""
    sources = {link.name: link for link in links_of(row.artifact.manifest)}
    source = sources.get("source")
    return {
        "prompts": index.name_of(row.artifact),
        "row": row.number,
        "source": source.path if source else None,
        "digest": source.digest if source else None,
    }


def sampling_of(completion: Completion | None) -> dict[str, Any]:
    """How an answer was sampled; None where its rollouts are gone."""
    if completion is None:
        return {"tokens": None, "seed": None, "sampling": None, "mean_logprob": None}
    logprobs = completion.logprobs
    return {
        "tokens": len(completion.response_ids),
        "seed": completion.seed,
        "sampling": msgspec.to_builtins(completion.sampling),
        "mean_logprob": math.fsum(logprobs) / len(logprobs) if logprobs else None,
    }


def scores_of(
    index: Index, sampled: OriginRow, pairs: Artifact | None, unread: Unread
) -> Iterator[tuple[str, dict[int, float]]]:
    """What each scorer says of the samples of a rollout, by sample.

    Of scores that were set aside, only those that the pairs were made from count. A scorer's name that occurs twice
    is followed by its place.
    """
    rollouts, prompt = sampled.artifact.manifest.digest, sampled.record.prompt_id
    read = pairs.manifest.inputs.get("scores") if pairs else None
    names: set[str] = set()
    for artifact in of_schema(index, SCORES):
        manifest = artifact.manifest
        place = index.name_of(artifact)
        if manifest.inputs.get("rollouts") != rollouts or (is_superseded(place) and manifest.digest != read):
            continue
        rows = rows_with(artifact, Score, prompt, unread, sampled.shard)
        values = {row.record.sample: row.record.score for row in rows if row.record.prompt_id == prompt}
        name = name_of_scorer(artifact)
        if values:
            yield (f"{name} ({place})" if name in names else name), values
        names.add(name)


def name_of_scorer(scores: Artifact) -> str:
    """The name that scores are known by."""
    return str(scores.manifest.facts.get("scorer") or scores.manifest.key_parts.get("config", {}).get("name", "score"))


def scorer_of(index: Index, pairs: Artifact) -> str | None:
    """The scorer whose scores selected and label the pairs."""
    found = index.input_of(pairs, "scores")
    return name_of_scorer(found.artifact) if found and found.artifact else None


def prompt_origins(indexes: list[Index], prompt_id: str, unread: Unread) -> dict[str, Any] | None:
    """A prompt in all runs that have it: where it is from, and all rollouts, pairs and experience of it."""
    found = []
    for index in indexes:
        known = [
            imported_from(index, row) | {"messages": msgspec.to_builtins(row.record.messages)}
            for row in rows_of(index, PROMPTS, Prompt, prompt_id, unread)
        ]
        rollouts = [rollout_origin(index, row, unread) for row in rows_of(index, ROLLOUTS, Rollout, prompt_id, unread)]
        pairs = [
            {
                "pairs": index.name_of(row.artifact),
                "pair_id": row.record.pair_id,
                "iteration": row.record.iteration,
                "chosen_sample": row.record.chosen_sample,
                "rejected_sample": row.record.rejected_sample,
                "margin": row.record.margin,
            }
            for row in rows_of(index, PAIRS, Pair, prompt_id, unread)
        ]
        experience = [experience_of(index, row) for row in rows_of(index, EXPERIENCE, ExperienceRow, prompt_id, unread)]
        if known or rollouts or pairs or experience:
            parts = {"prompts": known, "rollouts": rollouts, "pairs": pairs, "experience": experience}
            found.append({"run": str(index.path), **parts})
    return {"kind": "prompt", "prompt_id": prompt_id, "found": found} if found else None


def rollout_origin(index: Index, row: OriginRow, unread: Unread) -> dict[str, Any]:
    """One rollout of a prompt: its policy, and its answers with their scores."""
    policy = index.input_of(row.artifact, "policy")
    scores = list(scores_of(index, row, None, unread))
    return {
        "rollouts": index.name_of(row.artifact),
        "iteration": row.record.iteration,
        "policy": {"weights": row.record.policy, "checkpoint": str(policy.place) if policy else None},
        "messages": msgspec.to_builtins(row.record.messages),
        "answers": [
            {
                "sample": completion.sample,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                **sampling_of(completion),
                "scores": {name: values[completion.sample] for name, values in scores if completion.sample in values},
            }
            for completion in row.record.completions
        ],
    }


def experience_of(index: Index, row: OriginRow) -> dict[str, Any]:
    """What was learned from the answers to a prompt, in means over their tokens; and by which checkpoints."""
    return {
        "experience": index.name_of(row.artifact),
        "iteration": row.record.iteration,
        "used_by": used_by(index, row.artifact),
        "answers": [
            {
                "sample": sample.sample,
                "tokens": len(sample.response_ids),
                "reward": sample.reward,
                "advantage": math.fsum(sample.advantages) / len(sample.advantages),
                "kl": None if sample.reference is None else math.fsum(sample.behaviour) - math.fsum(sample.reference),
                "value": None if sample.values is None else sample.values[0],
            }
            for sample in row.record.samples
        ],
    }


def used_by(index: Index, artifact: Artifact) -> list[str]:
    """The checkpoints that were trained on an artifact."""
    return [
        index.name_of(checkpoint)
        for checkpoint in of_schema(index, CHECKPOINT)
        if any(reads(index, link, artifact) for link in links_of(checkpoint.manifest))
    ]


def of_schema(index: Index, schema: Schema) -> list[Artifact]:
    """The artifacts that hold one kind of thing, those in superseded/ last."""
    return [artifact for artifact in index.artifacts.values() if artifact.manifest.schema == schema]


def rows_of(index: Index, schema: Schema, kind: type[Any], prompt_id: str, unread: Unread) -> Iterator[OriginRow]:
    """All rows of a prompt."""
    for artifact in of_schema(index, schema):
        for row in rows_with(artifact, kind, prompt_id, unread):
            if row.record.prompt_id == prompt_id:
                yield row


def find_row(artifact: Artifact | None, kind: type[Any], field: str, value: str, unread: Unread) -> OriginRow | None:
    """The first row that has a value."""
    rows = rows_with(artifact, kind, value, unread) if artifact else iter(())
    return next((row for row in rows if getattr(row.record, field) == value), None)
