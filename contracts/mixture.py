"""Configuration of the draw stage, which selects the prompts of an iteration from one or several prompt sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from contracts.config import Section, StageConfig, identity, input_path

SOURCE = "source:"
"""Prefix of the tag that names the set of a mixture which a prompt comes from."""


class CurriculumSettings(Section):
    """Which prompts are repeated, by the scores of their responses in earlier iterations."""

    measure: Literal["score", "pass_rate", "rank"] = identity("score")
    """What `low` and `high` apply to. score: the mean score of a prompt's responses. pass_rate: the share of them that
    score at least `passes`. rank: the share of its source's prompts whose mean score is lower; for rewards without a
    fixed scale."""
    low: float | None = identity(None)
    """Prompts below this are too hard."""
    high: float | None = identity(None)
    """Prompts above this are too easy."""
    passes: float | None = identity(None)
    """For measure=pass_rate: the score at which a response passes."""
    fresh: float = identity(0.5, ge=0, le=1)
    """Share of new prompts in an iteration, as long as the source has some; the others are repeated prompts between low
    and high, the least recently used first."""
    iterations: int | None = identity(None, ge=1)
    """Look back this many iterations; prompts sampled before that do not count as new, and are in no band."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("it has neither low nor high, so that no prompt is preferred to another. Set one of them.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low:g} is above high={self.high:g}; no prompt lies between them.")
        if (self.measure == "pass_rate") != (self.passes is not None):
            raise ValueError(
                "passes is the score from which on an answer passes, for measure=pass_rate and no other; here measure="
                f"{self.measure} and passes={self.passes}. Set both or neither."
            )
        if self.measure != "score" and any(not 0 <= bound <= 1 for bound in (self.low, self.high) if bound is not None):
            raise ValueError(f"low={self.low} and high={self.high} are shares for measure={self.measure}: from 0 to 1.")
        return self


class DrawConfig(StageConfig):
    """Draw the prompts of an iteration from published prompt sets."""

    stage: ClassVar[str] = "draw"
    code_version: ClassVar[int] = 1

    sources: dict[str, Path] = input_path(min_length=1)
    """Published prompts by names of your choice, which become tags: source:NAME."""
    weights: dict[str, float] = identity({})
    """Sampling weight of each source; 1 by default."""
    count: int = identity(ge=1)
    """Number of prompts to draw."""
    after: Path | None = input_path(None)
    """An earlier draw, to continue after it. Each source is read in order, and restarts at its end."""
    curriculum: CurriculumSettings | None = identity(None)
    """Rules by which prompts are repeated before a source is exhausted."""
    history: list[Path] = input_path([])
    """For the curriculum: published scores of earlier iterations, in order."""
    replaces: list[Path] = input_path([])
    """The earlier draws for this iteration, to draw a replacement for each prompt without a signal: all scores are
    equal or, with `margin`, differ by less. Nothing is drawn if every prompt has one."""
    judged: list[Path] = input_path([])
    """Published scores of the responses to each draw in `replaces`, in the same order."""
    margin: float = identity(0.0, ge=0)
    """Minimum difference between the best and the worst score of a prompt's responses."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if extra := sorted(set(self.weights) - set(self.sources)):
            raise ValueError(f"weights.{extra[0]}: there is no such source, only {', '.join(sorted(self.sources))}.")
        if wrong := sorted(name for name, weight in self.weights.items() if weight <= 0):
            raise ValueError(
                f"weights.{wrong[0]} is {self.weights[wrong[0]]:g}; it must be above 0. Leave out a source of which "
                "nothing is to be drawn."
            )
        if self.history and self.curriculum is None:
            raise ValueError("history is for a curriculum; without one no score decides. Leave it out.")
        if len(self.replaces) != len(self.judged):
            raise ValueError(
                f"{len(self.replaces)} draws in replaces, but {len(self.judged)} scores in judged. Give one for each."
            )
        return self


def no_signal_reason(scores: Sequence[float], margin: float) -> str | None:
    """The reason why the scores of a prompt's answers carry no learning signal; None if they carry one.

    Dynamic sampling replaces such prompts (DAPO, arXiv 2503.14476, section 3.2): if all answers are right, or all are
    wrong, no answer has an advantage.
    """
    if len(scores) < 2:
        return "too_few_scores"
    spread = max(scores) - min(scores)
    if spread == 0:
        return "no_signal"
    return "below_margin" if spread < margin else None


def next_sources(weights: Mapping[str, float], taken: Mapping[str, int], count: int) -> list[str]:
    """The names of the sources of the next `count` prompts, in order.

    Each prompt comes from the source that is furthest behind its share of all prompts so far; ties go to the first by
    name.

    Args:
        taken: number of prompts drawn from each source so far.
    """
    names = sorted(weights)
    total, drawn = sum(weights.values()), {name: taken.get(name, 0) for name in names}
    found = []
    for number in range(sum(drawn.values()) + 1, sum(drawn.values()) + count + 1):
        name = max(names, key=lambda name: weights[name] * number / total - drawn[name])
        drawn[name] += 1
        found.append(name)
    return found


def too_few_prompts(name: str, available: int, count: int, wanted: int) -> str:
    """The message for a source that has fewer prompts than an iteration of `count` prompts takes from it."""
    return (
        f"source {name} has {available} prompts, but its share of count={count} is {wanted}, and no prompt is answered "
        "twice in one iteration. Lower its weight or the count (in a run: prompts.per_iteration), or add more "
        "prompts."
    )
