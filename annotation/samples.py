"""What a scorer is given, and what it answers."""

from typing import NamedTuple, Protocol

from contracts.faults import Fault
from contracts.records import Completion, Rollout, Score


class Sample(NamedTuple):
    """One completion with the rollout that it belongs to."""

    rollout: Rollout
    completion: Completion

    def scored(self, score: float, **tokens: tuple[float, ...]) -> Score:
        """The record of this sample's score; `tokens`: token_logprobs or token_values, if known."""
        return Score(self.rollout.prompt_id, self.completion.sample, score, **tokens)

    def __str__(self) -> str:
        """`prompt 0123456789abcdef, sample 2`, for error messages."""
        return f"prompt {self.rollout.prompt_id}, sample {self.completion.sample}"


class Scorer(Protocol):
    """What each kind of scorer is, once its model or function is loaded."""

    facts: dict[str, str]
    """What the manifest says of how it computes: dtype and device."""
    counts: dict[str, int]
    """What is counted beside the samples themselves, of the shard that was judged last."""

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """Judge the samples of one shard, in their order; a string is the reason for which a sample is dropped."""
        ...
