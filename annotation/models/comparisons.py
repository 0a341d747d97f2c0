"""Selects which answers to a prompt are compared, and turns the results into scores. Needs no torch.

An answer's score is the probability that it is better than another one, in [0, 1], averaged over the answers that it is
compared with. Every two answers are compared in both orders and the results averaged, which cancels a position bias of
the model or judge.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from annotation.samples import Sample
from contracts.artifacts import Artifact
from contracts.faults import Fault
from contracts.records import ROLLOUTS, Rollout, Score

Comparison = tuple[str, str, str]
"""A prompt's id and two different answers to it, in alphabetical order, so that both answers share one comparison."""
Result = float | str | Fault
"""The probability that the first answer is better, or the reason for which it is unknown."""


class Opponents:
    """Selects each sample's opponents, among the other answers to its prompt or among those of other rollouts."""

    def __init__(self, count: int | None, against: Path | None) -> None:
        """`count`: number of answers that each is compared with; None: all. `against`: published rollouts."""
        self.count = count
        self.against = None if against is None else _answers(against)

    def of(self, samples: Sequence[Sample]) -> list[list[str]]:
        """The answers that each sample is compared with. They include its own text if another sample has the same."""
        return list(self._select(samples))

    def _select(self, samples: Sequence[Sample]) -> Iterator[list[str]]:
        """The opponents of each sample. If they are limited, these are its nearest neighbours in the ring of the
        prompt's answers: opponents are then mostly mutual, which halves the number of comparisons."""
        if self.against is not None:
            for sample in samples:
                yield self.against.get(sample.rollout.prompt_id, [])[: self.count]
            return
        rings: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            rings.setdefault(sample.rollout.prompt_id, []).append(index)
        for index, sample in enumerate(samples):
            ring = rings[sample.rollout.prompt_id]
            place, size = ring.index(index), len(ring)
            steps = [step for distance in range(1, size // 2 + 1) for step in (distance, -distance)][: size - 1]
            yield [samples[ring[(place + step) % size]].completion.text for step in steps[: self.count]]


def all_comparisons(samples: Sequence[Sample], opponents: Sequence[Sequence[str]]) -> dict[Comparison, Sample]:
    """All comparisons, each with the first sample that takes part in it; identical answers have no comparison."""
    found: dict[Comparison, Sample] = {}
    for sample, others in zip(samples, opponents, strict=True):
        for other in others:
            if other != sample.completion.text:
                found.setdefault(comparison_of(sample, other), sample)
    return found


def comparison_of(sample: Sample, other: str) -> Comparison:
    """The comparison of a sample and another answer."""
    first, second = sorted((sample.completion.text, other))
    return sample.rollout.prompt_id, first, second


def score_of(sample: Sample, others: Sequence[str], results: Mapping[Comparison, Result]) -> Score | str | Fault:
    """A sample's mean probability of winning; identical answers tie.

    If no comparison has a result, the reason why one of them has none, or "no_opponent". A comparison that fails makes
    both of its samples fail.
    """
    chances: list[float] = []
    reason = "no_opponent"
    for other in others:
        comparison = comparison_of(sample, other)
        result = 0.5 if other == sample.completion.text else results[comparison]
        if isinstance(result, Fault):
            return result
        if isinstance(result, str):
            reason = result
        else:
            chances.append(result if comparison[1] == sample.completion.text else 1 - result)
    return sample.scored(sum(chances) / len(chances)) if chances else reason


def _answers(path: Path) -> dict[str, list[str]]:
    """The answers in published rollouts, by prompt id."""
    rows = Artifact.open(path, ROLLOUTS).rows(Rollout)
    return {row.prompt_id: [completion.text for completion in row.completions] for row in rows}
