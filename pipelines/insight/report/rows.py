"""Reads the fields of rollouts, scores and pairs that a report needs."""

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
"""Version of the chunks' format."""
CHUNK_BYTES = 400_000
"""Bytes of texts in a chunk, before compression."""
MAX_GROUPS = 20_000
"""Prompts of one set that are shown; further ones only count in the statistics."""


class CompletionFields(msgspec.Struct):
    """The fields of a completion that a report reads."""

    sample: int
    response_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float]


class RolloutFields(msgspec.Struct):
    """The fields of a rollout that a report reads."""

    prompt_id: str
    messages: list[Message]
    completions: list[CompletionFields]
    tags: list[str] = []
    answer: str | None = None


class ScoreFields(msgspec.Struct):
    """The fields of a score that a report reads."""

    prompt_id: str
    sample: int
    score: float
    token_logprobs: list[float] | None = None
    parts: dict[str, float] | None = None
    extras: dict[str, Any] | None = None


class PairFields(msgspec.Struct):
    """The fields of a pair that a report reads."""

    prompt_id: str
    chosen_sample: int
    rejected_sample: int
    chosen_score: float
    rejected_score: float
    margin: float


@dataclass
class SetSources:
    """The artifacts from which a set is read."""

    name: str
    role: str
    iteration: int | None
    rollouts: Artifact
    scores: dict[str, Artifact] = field(default_factory=dict)
    """Scores by scorer; the first one is that by which pairs are chosen."""
    pairs: Artifact | None = None
    reference: Artifact | None = None
    """Log-probabilities under a reference model."""
    policy: Path | None = None
    """The model that sampled, whose vocabulary has the texts of the tokens."""
    strategy: str = ""

    @property
    def key(self) -> str:
        """Digest of everything that determines the set."""
        parts = [*self.scores.values(), *filter(None, (self.pairs, self.reference))]
        found = [self.name, self.rollouts.manifest.digest, *(part.manifest.digest for part in parts)]
        return digest([FORMAT, found, list(self.scores), CHUNK_BYTES, MAX_GROUPS])[:16]


def last_user_turn(row: RolloutFields) -> str:
    """The last turn of the user."""
    return next((message.content for message in reversed(row.messages) if message.role == "user"), "")


def text_of_turn(message: Message) -> str:
    """The text of a turn, with its reasoning and its tool calls."""
    thought, calls = message.reasoning_content, message.tool_calls
    parts = [thought if isinstance(thought, str) else "", message.content]
    parts += [msgspec.json.encode(call).decode() for call in calls] if isinstance(calls, tuple) else []
    return "\n".join(filter(None, parts))


def scores_in(artifact: Artifact, shard: str) -> dict[str, dict[int, ScoreFields]]:
    """The scores of a shard by prompt id and sample."""
    found: dict[str, dict[int, ScoreFields]] = {}
    for score in read_jsonl(artifact.path / shard, ScoreFields):
        found.setdefault(score.prompt_id, {})[score.sample] = score
    return found


def logprobs_in(artifact: Artifact, shard: str) -> dict[tuple[str, int], list[float]]:
    """The token log-probabilities (nats) of a shard by (prompt id, sample)."""
    return {
        (score.prompt_id, score.sample): score.token_logprobs or []
        for score in read_jsonl(artifact.path / shard, ScoreFields)
    }


def pairs_in(artifact: Artifact | None) -> dict[str, list[PairFields]]:
    """All pairs by prompt id. Their shards are not those of the rollouts, so they are read at once."""
    found: dict[str, list[PairFields]] = {}
    for pair in _pairs(artifact):
        found.setdefault(pair.prompt_id, []).append(pair)
    return found


def _pairs(artifact: Artifact | None) -> Iterator[PairFields]:
    for shard in artifact.shards if artifact else []:
        yield from read_jsonl(shard, PairFields)
