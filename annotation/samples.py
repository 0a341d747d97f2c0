"""The interface of scorers."""

from typing import NamedTuple, Protocol

from contracts.faults import Fault
from contracts.records import Completion, Rollout, Score


class Sample(NamedTuple):
    """One completion with its rollout."""

    rollout: Rollout
    completion: Completion

    def scored(self, score: float, **tokens: tuple[float, ...]) -> Score:
        """The record of this sample's score; `tokens`: token_logprobs or token_values, if known."""
        return Score(self.rollout.prompt_id, self.completion.sample, score, **tokens)

    def __str__(self) -> str:
        """`prompt 0123456789abcdef, sample 2`, for error messages."""
        return f"prompt {self.rollout.prompt_id}, sample {self.completion.sample}"


class Scorer(Protocol):
    """A scorer with its model or function loaded."""

    facts: dict[str, str]
    """Facts for the manifest: dtype and device."""
    counts: dict[str, int]
    """Additional counts for the manifest, of the last shard."""

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """Score the samples of one shard, in order; a string is the reason why a sample is dropped."""
        ...
