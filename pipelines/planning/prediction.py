"""What a stage is expected to take, and what that is known from."""

import math
import random
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

from pipelines.graph import Graph, Node

Basis: TypeAlias = Literal["measured", "scaled", "analytic"]
"""measured: stages alike in all that counts were run; scaled: a measured rate, for another number of tokens or another
layout; analytic: a roofline of the model's operations and bytes on the hardware's data sheet, no run at all."""


@dataclass(frozen=True)
class Prediction:
    """What one stage is expected to take."""

    compute: float
    """Seconds, and so are the others."""
    load: float
    """Reading weights, building engines."""
    start: float
    """Processes and imports."""
    handoff: float
    """Saving, checking and publishing."""
    queue: float
    """Waiting for a scheduler."""
    memory: int | None
    """Bytes on its fullest device at the peak; None where that is not known."""
    basis: Basis
    error: float
    """One standard deviation of the whole, as a share of it."""
    source: str
    """In words: how many runs, or whose data sheet."""
    finish: float = 0.0
    """Seconds after it has given its devices back, until a further job has published what it has made."""

    @property
    def seconds(self) -> float:
        """In which the stage has its devices."""
        return self.start + self.load + self.compute + self.handoff

    def faster(self, share: float) -> "Prediction":
        """The same in so much less of the time."""
        left = 1 - share
        return replace(
            self,
            compute=left * self.compute,
            load=left * self.load,
            start=left * self.start,
            handoff=left * self.handoff,
        )


class Predictor(Protocol):
    """Knows some hardware, and what stages took on it or would take."""

    def predict(self, node: Node, graph: Graph) -> Prediction | None:
        """What a placed stage is expected to take; None where it cannot be known, which nobody may count as nothing."""


def drawn_factor(chance: random.Random, error: float) -> float:
    """By what a prediction is multiplied in one drawn run: lognormal, with the mean 1 and its error as the standard
    deviation."""
    width = math.sqrt(math.log1p(error * error))
    return math.exp(chance.gauss(0.0, 1.0) * width - width * width / 2)
