"""Noise contrastive alignment from preferences (NCA; Chen et al. 2024, arXiv 2402.05369, for two answers).

With the implicit rewards r = beta log-ratio; it keeps the likelihood of chosen answers from falling:

    -log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2
"""

from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0"}


def loss(batch: Pairs, *, beta: float = 0.1) -> Metrics:
    """beta: strength of the pull towards the reference."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    losses = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return {"loss": batch.mean(losses), **batch.rewards(chosen, rejected)}
