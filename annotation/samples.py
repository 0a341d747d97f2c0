"""The interface of scorers."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from contracts.faults import Fault
from contracts.records import Completion, Rollout, Score


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
        """The record of this sample's score.

        Args:
            score: the number.
            parts: numbers by name that it was made of.
            extras: what else is worth showing, as JSON by name.
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
        """`prompt 0123456789abcdef, sample 2`, for error messages."""
        return f"prompt {self.rollout.prompt_id}, sample {self.completion.sample}"


class Scorer(Protocol):
    """A scorer with its model or function loaded."""

    facts: dict[str, str]
    """Facts for the manifest: dtype and device."""
    counts: dict[str, int]
    """Additional counts for the manifest, of the last shard."""
    unread: str = ""
    """Of judges: what one has said of the last shard that is no judgement, in words."""

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """Score the samples of one shard, in order; a string is the reason why a sample is dropped."""
        ...
