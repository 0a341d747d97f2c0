"""Accuracy and calibration of a reward model on held-out pairs."""

from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from training.loop import FinalReport

BINS = 10
"""Number of bins, which divide the confidences from 0.5 to 1 equally."""
FILE = "calibration.jsonl"


class Bin(msgspec.Struct):
    """Held-out pairs of similar confidence: a point of the reliability diagram."""

    low: float
    high: float
    """Confidence at the edges of the bin."""
    count: int
    confidence: float | None
    """Mean probability that the model gives to the answer it prefers; None for an empty bin."""
    accuracy: float | None
    """Share of the pairs in which the preferred answer is the better one; a tie counts as half."""


def evaluate_pairs(scores: NDArray[np.float32], *, orders: int) -> FinalReport:
    """Evaluate a reward model on held-out pairs.

    Args:
        scores: scores of the better and the worse answer of each pair, [pairs * orders, 2].
        orders: 1; or 2 if each pair is scored twice, with the better answer first and then with the worse one first.
            The probability that the better answer wins is then the mean of both.

    Returns:
        Metrics (loss, accuracy, chosen_score, rejected_score and margin as in training; ties: share of the pairs
        without a preference, which count as wrong; ece: the expected calibration error of Guo et al. 2017, arXiv
        1706.04599, eq. 3, with p = sigmoid(margin) and the confidence max(p, 1 - p)) and its bins. With two orders also
        the accuracy in each, and consistency: the share of pairs in which both orders prefer the same answer.
    """
    chosen, rejected = scores.astype(np.float64).T
    margins = (chosen - rejected).reshape(-1, orders)
    p = (0.5 * (1 + np.tanh(margins / 2))).mean(1)
    bins = calibrate(p)
    metrics = {
        "loss": np.logaddexp(0, -margins).mean(),
        "accuracy": (p > 0.5).mean(),
        "chosen_score": chosen.mean(),
        "rejected_score": rejected.mean(),
        "margin": margins.mean(),
        "ties": (p == 0.5).mean(),
        "ece": sum(bin.count * abs((bin.accuracy or 0) - (bin.confidence or 0)) for bin in bins) / len(p),
    }
    if orders == 2:
        first, second = margins.T
        metrics |= {
            "accuracy_better_first": (first > 0).mean(),
            "accuracy_better_second": (second > 0).mean(),
            "consistency": (first * second > 0).mean(),
        }
    return FinalReport({name: float(value) for name, value in metrics.items()}, {FILE: bins})


def calibrate(p: NDArray[np.float64]) -> list[Bin]:
    """Sort pairs into bins by confidence; `p` is the probability that the better answer wins, [pairs]."""
    confidence = np.maximum(p, 1 - p)
    right = np.where(p == 0.5, 0.5, p > 0.5)
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = []
    for number, (low, high) in enumerate(pairwise(round(0.5 + edge / (2 * BINS), 3) for edge in range(BINS + 1))):
        inside = place == number
        count = int(inside.sum())
        means = [float(values[inside].mean()) if count else None for values in (confidence, right)]
        bins.append(Bin(low, high, count, *means))
    return bins
