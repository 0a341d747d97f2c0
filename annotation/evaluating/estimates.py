"""Computes means and 95 % intervals of clustered samples, as the K answers to a prompt are not independent."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean and the half width of its 95 % interval; None if it cannot be computed."""

    mean: float | None
    ci95: float | None


def clustered(clusters: Sequence[Sequence[float]]) -> Estimate:
    """Mean over all values, with an interval that treats each cluster (prompt) as one draw.

    With G clusters, N values x_gk in total and their mean m, the residual sum of a cluster is r_g = sum_k (x_gk - m),
    and

        half width = 1.96 * sqrt(G / (G - 1) * sum_g r_g^2) / N

    (Liang and Zeger 1986, the cluster-robust standard error of a mean). With one value per cluster that is the usual
    1.96 s / sqrt(N). With fewer than two clusters there is no interval. Empty clusters are ignored.
    """
    filled = [values for values in clusters if values]
    count = sum(map(len, filled))
    if not count:
        return Estimate(None, None)
    mean = math.fsum(value for values in filled for value in values) / count
    if len(filled) < 2:
        return Estimate(mean, None)
    squares = math.fsum(math.fsum(value - mean for value in values) ** 2 for values in filled)
    return Estimate(mean, 1.96 * math.sqrt(len(filled) / (len(filled) - 1) * squares) / count)


def win_share(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Share of all pairs (one of ours, one of theirs) in which ours is higher; ties count half."""
    points = sum((a > b) + 0.5 * (a == b) for a in ours for b in theirs)
    return points / (len(ours) * len(theirs))
