"""Compares plans under random prediction errors, to decide whether a found plan is really faster than a fixed
strategy."""

import random
import statistics
from dataclasses import dataclass

from pipelines.planning.prediction import random_factor
from pipelines.planning.search.evaluation import QUEUE, ExpectedRun

DRAWS = 200
REPORTED_DRAWS = 60
"""Number of draws for the error of one plan, which is only reported."""
CONFIDENCE = 0.95
"""Minimum share of the draws in which the found plan must be faster to be chosen."""


QUEUE_ERROR = 1.0
"""The error of a scheduler's queue time: its other jobs are not known in advance."""

UNSEEN_ERROR = 1.0
"""Minimum error of stages in a layout that no run has used. The stated error of scaled predictions was measured between
sizes of one layout; it says nothing about another one, whose processes may not be reused, load more than once, or wait
for each other."""

SIMULATION_ERROR = 0.025
"""One standard deviation of the simulation's own error if all stages take the predicted time: 19 of 20 random plans
were within 5 % (benchmarks/simulation.py)."""


@dataclass(frozen=True)
class PlanComparison:
    """The expected difference between two plans, and its uncertainty."""

    gain: float
    """Seconds by which the first plan is expected to be faster."""
    error: float
    """One standard deviation of the gain."""
    win_share: float
    """The share of the draws in which the first plan is faster."""

    @property
    def is_sure(self) -> bool:
        """Whether the first plan is faster with enough certainty to be chosen."""
        return self.gain > 0 and self.win_share >= CONFIDENCE


def compare(found: ExpectedRun, fixed: ExpectedRun, *, seed: int = 0) -> PlanComparison:
    """Simulate both plans many times, with random prediction errors.

    In each draw, one factor multiplies the times of all stages of a role in one layout (lognormal, mean 1, the
    prediction's error as standard deviation). Stages with the same layout in both plans have the same factor in both,
    so that their errors cancel. Stages with different layouts have independent factors; in a layout that no run has
    used, the error is at least UNSEEN_ERROR. The error of the simulation itself (SIMULATION_ERROR) is drawn for each
    plan, and that of a scheduler's queue (QUEUE_ERROR) for both together.
    """
    errors = layout_errors(fixed)
    for shape, error in layout_errors(found).items():
        if shape not in errors:
            errors[shape] = error if shape in {QUEUE, *measured_shapes(found)} else max(error, UNSEEN_ERROR)
    if found.section == fixed.section:
        return PlanComparison(0.0, 0.0, 0.0)
    rng = random.Random(f"runs {seed}")
    pairs = []
    for factors in _draws(errors, seed):
        mine, other = found.seconds_with(factors), fixed.seconds_with(factors)
        pairs.append(other * random_factor(rng, SIMULATION_ERROR) - mine * random_factor(rng, SIMULATION_ERROR))
    wins = sum(pair > 0 for pair in pairs)
    return PlanComparison(fixed.seconds - found.seconds, statistics.pstdev(pairs), wins / len(pairs))


def error_of(run: ExpectedRun, *, seed: int = 0) -> float:
    """One standard deviation of a plan's expected time, in seconds, from draws of prediction errors."""
    return statistics.pstdev(
        [run.seconds_with(factors) for factors in _draws(layout_errors(run), seed, REPORTED_DRAWS)]
    )


def layout_errors(run: ExpectedRun) -> dict[str, float]:
    """The largest error of the predictions of each shape."""
    found: dict[str, float] = {}
    for name, prediction in run.simulation.predictions.items():
        shape = run.shapes[name]
        found[shape] = max(found.get(shape, 0.0), prediction.error)
        if prediction.queue:
            found[QUEUE] = QUEUE_ERROR
    return found


def measured_shapes(run: ExpectedRun) -> set[str]:
    """The shapes whose predictions are all measured."""
    shapes = set(run.shapes.values())
    return shapes - {run.shapes[name] for name, one in run.simulation.predictions.items() if one.basis != "measured"}


def _draws(errors: dict[str, float], seed: int, count: int = DRAWS) -> list[dict[str, float]]:
    rng = random.Random(seed)
    return [{shape: random_factor(rng, errors[shape]) for shape in sorted(errors)} for _ in range(count)]
