"""Which answers to a prompt are compared with which, and what an answer's comparisons make its score. No torch.

An answer's score is its probability to be better than another one, in [0, 1], averaged over the answers that it is
compared with. Both orders of every two answers are asked, and averaged, so that a liking of whoever compares for the
first or the second place cancels.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from annotation.samples import Sample
from contracts.artifacts import Artifact
from contracts.faults import Fault
from contracts.records import ROLLOUTS, Rollout, Score

Contest = tuple[str, str, str]
"""A prompt's id and two different answers to it, in alphabetical order: whoever asks, it is held once."""
Result = float | str | Fault
"""The probability that the first answer is better, or why nobody knows."""


class Contests:
    """The contests of each sample, against the other answers to its prompt or against those of other rollouts."""

    def __init__(self, opponents: int | None, against: Path | None) -> None:
        """`opponents`: answers that each is compared with; None: all. `against`: published rollouts."""
        self.opponents = opponents
        self.against = None if against is None else _answers(against)

    def of(self, samples: Sequence[Sample]) -> list[list[str]]:
        """The answers that each sample is compared with, its own text among them where others say the same."""
        return list(self._rivals(samples))

    def _rivals(self, samples: Sequence[Sample]) -> Iterator[list[str]]:
        """With fewer opponents than there are, a sample's nearest neighbours in the ring of the prompt's answers: that
        of two answers each is mostly the other's opponent halves the comparisons."""
        if self.against is not None:
            for sample in samples:
                yield self.against.get(sample.rollout.prompt_id, [])[: self.opponents]
            return
        rings: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            rings.setdefault(sample.rollout.prompt_id, []).append(index)
        for index, sample in enumerate(samples):
            ring = rings[sample.rollout.prompt_id]
            place, size = ring.index(index), len(ring)
            steps = [step for distance in range(1, size // 2 + 1) for step in (distance, -distance)][: size - 1]
            yield [samples[ring[(place + step) % size]].completion.text for step in steps[: self.opponents]]


def wanted(samples: Sequence[Sample], rivals: Sequence[Sequence[str]]) -> dict[Contest, Sample]:
    """All contests, each with the first sample that takes part in it; none between equal answers."""
    found: dict[Contest, Sample] = {}
    for sample, others in zip(samples, rivals, strict=True):
        for other in others:
            if other != sample.completion.text:
                found.setdefault(contest(sample, other), sample)
    return found


def contest(sample: Sample, other: str) -> Contest:
    """That of a sample and another answer."""
    first, second = sorted((sample.completion.text, other))
    return sample.rollout.prompt_id, first, second


def score(sample: Sample, others: Sequence[str], results: Mapping[Contest, Result]) -> Score | str | Fault:
    """A sample's mean chance; identical answers tie. Without any, the reason of its first contest, or "no_opponent".

    A comparison that fails, fails for both.
    """
    chances: list[float] = []
    reason = "no_opponent"
    for other in others:
        held = contest(sample, other)
        result = 0.5 if other == sample.completion.text else results[held]
        if isinstance(result, Fault):
            return result
        if isinstance(result, str):
            reason = result
        else:
            chances.append(result if held[1] == sample.completion.text else 1 - result)
    return sample.scored(sum(chances) / len(chances)) if chances else reason


def _answers(path: Path) -> dict[str, list[str]]:
    """The answers in published rollouts, by their prompts."""
    rows = Artifact.open(path, ROLLOUTS).rows(Rollout)
    return {row.prompt_id: [completion.text for completion in row.completions] for row in rows}
