"""Learning rate schedules."""

import math
from typing import Literal


def learning_rate(
    step: int, total: int, *, peak: float, shape: Literal["cosine", "linear", "constant"], warmup_ratio: float
) -> float:
    """The learning rate of step `step` (from 0) of `total`.

    It rises linearly over the warm-up, whose first step is already above zero, is `peak` in the first step after it,
    and would reach zero one step after the last (cosine, linear).
    """
    warmup = math.ceil(warmup_ratio * total) if total > 1 else 0
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if shape == "constant":
        return peak
    progress = (step - warmup) / (total - warmup)
    return peak * (1 - progress) if shape == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))
