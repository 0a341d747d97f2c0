"""Provably robust DPO (rDPO; Chowdhury, Kini & Natarajan 2024, arXiv 2403.00409): unbiased under flipped labels.

With d = log-ratio of the chosen minus log-ratio of the rejected answer, and labels flipped with probability e:

    (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)
"""

from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0", "label_smoothing": ">= 0, < 0.5"}


def loss(batch: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Metrics:
    """beta: strength of the pull towards the reference; label_smoothing: probability that a label is flipped (e)."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    logits = chosen - rejected
    losses = -(1 - label_smoothing) * logsigmoid(logits) + label_smoothing * logsigmoid(-logits)
    return {"loss": batch.mean(losses) / (1 - 2 * label_smoothing), **batch.rewards(chosen, rejected)}
