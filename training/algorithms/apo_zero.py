"""Anchored preference optimization, zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7).

For chosen answers that are better than the policy's own: raises their likelihood and lowers that of the rejected. With
the implicit rewards r = beta log-ratio:

    -sigmoid(r_w) + sigmoid(r_l), plus 1 so that it is never below 0
"""

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0"}


def loss(batch: Pairs, *, beta: float = 0.1) -> Metrics:
    """beta: strength of the pull towards the reference."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    losses = 1 - chosen.sigmoid() + rejected.sigmoid()
    return {"loss": batch.mean(losses), **batch.rewards(chosen, rejected)}
