"""Which completions of a prompt become a preference pair: pure functions of the scores."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from contracts.seeds import derive_seed

Strategy = Literal["max_min", "max_random", "max_max", "all"]

TOO_FEW = "too_few_samples"
IDENTICAL = "identical_answers"
TIE = "tie"
BELOW_MARGIN = "below_margin"


class Candidate(NamedTuple):
    """A scored completion, as pair choice sees it."""

    sample: int
    response_ids: tuple[int, ...]
    score: float
    """The score that selects: the length penalty is in it already."""


class Choice(NamedTuple):
    """The pairs of one prompt, and the number of pairs that were dropped, by reason."""

    pairs: list[tuple[Candidate, Candidate]]
    """(chosen, rejected)."""
    dropped: dict[str, int]


def choose(candidates: Sequence[Candidate], strategy: Strategy, margin: float, seed: int, prompt_id: str) -> Choice:
    """Choose the pairs of one prompt.

    The candidates are ranked by score, equal scores by sample index. `max_min` pairs the first with the last,
    `max_max` with the second, `max_random` with any other, drawn by (seed, prompt), `all` every one with every later
    one. A pair is then dropped when its answers are identical, its scores are equal, or they differ by less than
    `margin`. A prompt with fewer than two candidates counts as one dropped pair, so that for every prompt
    `max(1, pairs of the strategy) = len(pairs) + sum(dropped)`.
    """
    if len(candidates) < 2:
        return Choice([], {TOO_FEW: 1})
    ranked = sorted(candidates, key=lambda candidate: (-candidate.score, candidate.sample))
    pairs: list[tuple[Candidate, Candidate]] = []
    dropped: dict[str, int] = {}
    for chosen, rejected in _proposals(ranked, strategy, seed, prompt_id):
        if reason := _fault(chosen, rejected, margin):
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            pairs.append((chosen, rejected))
    return Choice(pairs, dropped)


def _proposals(
    ranked: list[Candidate], strategy: Strategy, seed: int, prompt_id: str
) -> list[tuple[Candidate, Candidate]]:
    best, *others = ranked
    if strategy == "all":
        return [(ranked[i], ranked[j]) for i in range(len(ranked)) for j in range(i + 1, len(ranked))]
    if strategy == "max_min":
        return [(best, others[-1])]
    if strategy == "max_max":
        return [(best, others[0])]
    return [(best, others[derive_seed(seed, prompt_id) % len(others)])]


def _fault(chosen: Candidate, rejected: Candidate, margin: float) -> str | None:
    if chosen.response_ids == rejected.response_ids:
        return IDENTICAL
    if chosen.score == rejected.score:
        return TIE
    if chosen.score - rejected.score < margin:
        return BELOW_MARGIN
    return None
