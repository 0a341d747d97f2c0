"""Defines the predicted times and memory of a stage, and the interface of predictors."""

import math
import random
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

from pipelines.graph import Graph, Node

Basis: TypeAlias = Literal["measured", "scaled", "analytic"]
"""measured: from runs of matching stages; scaled: a measured rate, for another amount of work or another layout;
analytic: a roofline of the model's operations and bytes on the hardware's data sheet, without any run."""


@dataclass(frozen=True)
class Prediction:
    """The predicted times, in seconds, and memory of one stage."""

    compute: float
    """Computing."""
    load: float
    """Loading weights, building engines."""
    start: float
    """Starting processes, importing libraries."""
    handoff: float
    """Saving, checking and publishing."""
    queue: float
    """Waiting for a scheduler."""
    memory: int | None
    """Peak bytes on its fullest device; None if not known."""
    basis: Basis
    error: float
    """One standard deviation of `seconds`, as a share of it."""
    source: str
    """The source in words: the number of runs, or the data sheet."""
    finish: float = 0.0
    """Time from the release of its devices until a further job has published the output."""

    @property
    def seconds(self) -> float:
        """Time in which the stage holds its devices."""
        return self.start + self.load + self.compute + self.handoff

    def sped_up(self, share: float) -> "Prediction":
        """The prediction with the times on its devices reduced by a share; `queue` and `finish` stay."""
        left = 1 - share
        return replace(
            self,
            compute=left * self.compute,
            load=left * self.load,
            start=left * self.start,
            handoff=left * self.handoff,
        )


class Predictor(Protocol):
    """Predicts stages on particular hardware."""

    def predict(self, node: Node, graph: Graph) -> Prediction | None:
        """Predict a placed stage. None means unknown, which must never be counted as zero."""


def random_factor(rng: random.Random, error: float) -> float:
    """A random factor for a prediction: lognormal with mean 1, and the prediction's error as its standard deviation."""
    width = math.sqrt(math.log1p(error * error))
    return math.exp(rng.gauss(0.0, 1.0) * width - width * width / 2)
