"""What a report reads of answers, their scores and their pairs, and where they are."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from contracts.artifacts import Artifact
from contracts.fingerprint import digest
from contracts.jsonl import read_jsonl
from contracts.records import Message

FORMAT = 1
"""Of the chunks; changed with what they hold."""
CHUNK_BYTES = 400_000
"""Of texts in a chunk, before it is compressed."""
MOST_GROUPS = 20_000
"""Prompts of one set that are shown; further ones are only counted."""


class ReadAnswer(msgspec.Struct):
    """What is read of a completion."""

    sample: int
    response_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float]


class ReadRow(msgspec.Struct):
    """What the report reads of a rollout."""

    prompt_id: str
    messages: list[Message]
    completions: list[ReadAnswer]
    tags: list[str] = []
    answer: str | None = None


class ReadScore(msgspec.Struct):
    """What is read of a score."""

    prompt_id: str
    sample: int
    score: float
    token_logprobs: list[float] | None = None
    parts: dict[str, float] | None = None
    extras: dict[str, Any] | None = None


class ReadPair(msgspec.Struct):
    """What is read of a pair."""

    prompt_id: str
    chosen_sample: int
    rejected_sample: int
    chosen_score: float
    rejected_score: float
    margin: float


@dataclass
class SetSources:
    """The published directories that a set is made of."""

    name: str
    role: str
    iteration: int | None
    rollouts: Artifact
    scores: dict[str, Artifact] = field(default_factory=dict)
    """By scorer; the first is the one by which pairs are chosen."""
    pairs: Artifact | None = None
    reference: Artifact | None = None
    """Log-probabilities under a reference."""
    policy: Path | None = None
    """The model that sampled, for the texts of its tokens."""
    strategy: str = ""

    @property
    def key(self) -> str:
        """Changes with whatever the set is made of."""
        parts = [*self.scores.values(), *filter(None, (self.pairs, self.reference))]
        found = [self.name, self.rollouts.manifest.digest, *(part.manifest.digest for part in parts)]
        return digest([FORMAT, found, list(self.scores), CHUNK_BYTES, MOST_GROUPS])[:16]


def question_of(row: ReadRow) -> str:
    """What the user said last."""
    return next((message.content for message in reversed(row.messages) if message.role == "user"), "")


def text_of_turn(message: Message) -> str:
    """What a turn says, with its thoughts and its calls of tools."""
    thought, calls = message.reasoning_content, message.tool_calls
    parts = [thought if isinstance(thought, str) else "", message.content]
    parts += [msgspec.json.encode(call).decode() for call in calls] if isinstance(calls, tuple) else []
    return "\n".join(filter(None, parts))


def scores_in(artifact: Artifact, shard: str) -> dict[str, dict[int, ReadScore]]:
    """Scores by prompt and sample."""
    found: dict[str, dict[int, ReadScore]] = {}
    for score in read_jsonl(artifact.path / shard, ReadScore):
        found.setdefault(score.prompt_id, {})[score.sample] = score
    return found


def logprobs_in(artifact: Artifact, shard: str) -> dict[tuple[str, int], list[float]]:
    """Log-probabilities of the tokens (nats) by prompt and sample."""
    return {
        (score.prompt_id, score.sample): score.token_logprobs or []
        for score in read_jsonl(artifact.path / shard, ReadScore)
    }


def pairs_in(artifact: Artifact | None) -> dict[str, list[ReadPair]]:
    """All of them: choosing needs one file, whatever the shards of the rollouts."""
    found: dict[str, list[ReadPair]] = {}
    for pair in _pairs(artifact):
        found.setdefault(pair.prompt_id, []).append(pair)
    return found


def _pairs(artifact: Artifact | None) -> Iterator[ReadPair]:
    for shard in artifact.shards if artifact else []:
        yield from read_jsonl(shard, ReadPair)
