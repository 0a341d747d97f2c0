"""Anchored preference optimization, down (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8).

For chosen answers that are worse than the policy's own: lowers the likelihood of both, of the rejected more. With the
implicit rewards r = beta log-ratio:

    sigmoid(r_w) - sigmoid(r_w - r_l), plus 1 so that it is never below 0
"""

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0"}


def loss(batch: Pairs, *, beta: float = 0.1) -> Metrics:
    """beta: strength of the pull towards the reference."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    losses = chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()
    return {"loss": batch.mean(losses), **batch.rewards(chosen, rejected)}
