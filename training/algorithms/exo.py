"""Efficient exact optimization from preferences (EXO; Ji et al. 2024, arXiv 2402.00856, eq. 16, for two answers).

The reverse KL divergence of the policy's choice from the labels', smoothed by e. With q = sigmoid(beta d), where d is
the log-ratio of the chosen minus that of the rejected answer:

    q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e)
"""

import math

from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0", "label_smoothing": "> 0, < 0.5"}


def loss(batch: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.001) -> Metrics:
    """beta: strength of the pull towards the reference; label_smoothing: e, which the divergence needs above 0."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    log_q, log_other = logsigmoid(chosen - rejected), logsigmoid(rejected - chosen)
    losses = log_q.exp() * (log_q - math.log1p(-label_smoothing)) + log_other.exp() * (
        log_other - math.log(label_smoothing)
    )
    return {"loss": batch.mean(losses), **batch.rewards(chosen, rejected)}
