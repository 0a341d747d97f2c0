"""Whether a found plan is better than a fixed strategy by more than the predictions may be wrong."""

import random
import statistics
from dataclasses import dataclass

from pipelines.planning.prediction import drawn_factor
from pipelines.planning.search.evaluation import QUEUE, ExpectedRun

DRAWS = 200
FEW_DRAWS = 60
"""The same for the error of one plan, which decides nothing."""
SURE = 0.95
"""The share of the draws in which the found plan has to be the faster one."""


QUEUE_ERROR = 1.0
"""The error of a scheduler's queue: what else is in it when a job comes nobody knows."""

UNSEEN = 1.0
"""The error of stages in a layout that no run has shown, where nothing stated is larger. What is stated of scaled
predictions was measured between sizes of one layout: it says nothing of another one, whose processes may start anew,
load more than once, or wait for each other."""

RUN_ERROR = 0.025
"""One standard deviation of what a run in advance is wrong by where all of its stages take what is predicted: 19 of 20
drawn plans were within 5 % (benchmarks/simulation.py)."""


@dataclass(frozen=True)
class PlanComparison:
    """Two plans, by what is predicted and by how far predictions may be wrong."""

    gain: float
    """Seconds by which the first is expected to be faster."""
    error: float
    """One standard deviation of that."""
    chance: float
    """The share of the draws in which it is."""

    @property
    def is_sure(self) -> bool:
        """Whether that is enough to choose it."""
        return self.gain > 0 and self.chance >= SURE


def compare(found: ExpectedRun, fixed: ExpectedRun, *, seed: int = 0) -> PlanComparison:
    """Run both many times in advance, with stages that take more or less than predicted.

    In each draw what all stages of a role take in one layout is multiplied by one factor (lognormal, mean 1, with the
    prediction's error as its standard deviation). Where both plans have a stage in the same layout the factor is the
    same in both, so that this error cancels; another layout of the stage has another factor, as if nothing that is
    wrong about the one were wrong about the other; if it was never seen, its error is at least UNSEEN.
    What running in advance itself is wrong by (RUN_ERROR) is drawn for each plan, and a scheduler's queue (QUEUE_ERROR)
    for both.
    """
    errors = errors_of(fixed)
    for shape, error in errors_of(found).items():
        if shape not in errors:
            errors[shape] = error if shape in {QUEUE, *measured_of(found)} else max(error, UNSEEN)
    if found.section == fixed.section:
        return PlanComparison(0.0, 0.0, 0.0)
    chance = random.Random(f"runs {seed}")
    pairs = []
    for factors in _draws(errors, seed):
        mine, other = found.seconds_with(factors), fixed.seconds_with(factors)
        pairs.append(other * drawn_factor(chance, RUN_ERROR) - mine * drawn_factor(chance, RUN_ERROR))
    wins = sum(pair > 0 for pair in pairs)
    return PlanComparison(fixed.seconds - found.seconds, statistics.pstdev(pairs), wins / len(pairs))


def error_of(run: ExpectedRun, *, seed: int = 0) -> float:
    """One standard deviation of what a plan is expected to take, in seconds, by the same draws."""
    return statistics.pstdev([run.seconds_with(factors) for factors in _draws(errors_of(run), seed, FEW_DRAWS)])


def errors_of(run: ExpectedRun) -> dict[str, float]:
    """By shape the largest error of its predictions."""
    found: dict[str, float] = {}
    for name, prediction in run.simulation.predictions.items():
        shape = run.shapes[name]
        found[shape] = max(found.get(shape, 0.0), prediction.error)
        if prediction.queue:
            found[QUEUE] = QUEUE_ERROR
    return found


def measured_of(run: ExpectedRun) -> set[str]:
    """The shapes of which all predictions are those of stages alike."""
    shapes = set(run.shapes.values())
    return shapes - {run.shapes[name] for name, one in run.simulation.predictions.items() if one.basis != "measured"}


def _draws(errors: dict[str, float], seed: int, count: int = DRAWS) -> list[dict[str, float]]:
    chance = random.Random(seed)
    return [{shape: drawn_factor(chance, errors[shape]) for shape in sorted(errors)} for _ in range(count)]
