"""What a scorer is given, and what it answers."""

from collections.abc import Callable
from typing import NamedTuple

from contracts.records import Completion, Rollout, Score


class Sample(NamedTuple):
    """One completion with the rollout that it belongs to."""

    rollout: Rollout
    completion: Completion

    def scored(self, score: float, token_logprobs: tuple[float, ...] | None = None) -> Score:
        """The record of this sample's score."""
        return Score(self.rollout.prompt_id, self.completion.sample, score, token_logprobs)

    def __str__(self) -> str:
        """`prompt 0123456789abcdef, sample 2`, for error messages."""
        return f"prompt {self.rollout.prompt_id}, sample {self.completion.sample}"


Scorer = Callable[[list[Sample]], list[Score | str]]
"""Judges the samples of one shard; answers in their order, with the reason in words where a sample is dropped."""
