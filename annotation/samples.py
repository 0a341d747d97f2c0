"""The interface of scorers: a `Scorer` turns the `Sample`s of a shard into scores."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from contracts.faults import Fault
from contracts.records import Completion, Rollout, Score

SHOWN = 60
"""Maximum characters of a prompt in a message."""


class Sample(NamedTuple):
    """One completion with its rollout."""

    rollout: Rollout
    completion: Completion

    def scored(
        self,
        score: float,
        *,
        parts: Mapping[str, float] | None = None,
        extras: Mapping[str, Any] | None = None,
        **tokens: tuple[float, ...],
    ) -> Score:
        """The score record of this sample.

        Args:
            score: the score.
            parts: named numbers that the score is composed of.
            extras: further named JSON values to store with it, such as an explanation.
            tokens: token_logprobs, token_values or token_rewards, if known.
        """
        return Score(
            self.rollout.prompt_id,
            self.completion.sample,
            score,
            parts=dict(parts) if parts else msgspec.UNSET,
            extras=dict(extras) if extras else msgspec.UNSET,
            **tokens,
        )

    def __str__(self) -> str:
        """`prompt 0123456789abcdef ("What is 2 + 3?"), sample 2`, for error messages."""
        return f"{prompt_in_words(self.rollout)}, sample {self.completion.sample}"


def prompt_in_words(rollout: Rollout) -> str:
    """`prompt 0123456789abcdef ("What is 2 + 3?")`: the id, and the beginning of the last user message."""
    text = next((turn.content for turn in reversed(rollout.messages) if turn.role == "user"), "")
    words = " ".join(text[: 2 * SHOWN].split())
    shown = words if len(words) <= SHOWN and len(text) <= 2 * SHOWN else f"{words[:SHOWN]}..."
    return f'prompt {rollout.prompt_id} ("{shown}")'


class Scorer(Protocol):
    """A scorer whose model or function is loaded. If it has a method `close`, the stage calls it at its end."""

    facts: dict[str, str]
    """Facts for the manifest: dtype and device."""
    counts: dict[str, int]
    """Additional counts of the last shard, for the manifest."""
    unread: str = ""
    """For judges: a description of a reply in the last shard from which no score could be read."""

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """Score the samples of one shard, in order; a string is the reason why a sample is dropped."""
        ...
