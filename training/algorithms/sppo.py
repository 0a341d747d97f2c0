"""Self-play preference optimization (SPPO; Wu et al. 2024, arXiv 2405.00675, eq. 4.7), "hard".

The chosen answer wins with probability 1, the rejected with 0. With the log-ratios h, and beta for the paper's 1 / eta:

    (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2
"""

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0"}


def loss(batch: Pairs, *, beta: float = 0.1) -> Metrics:
    """beta: each log-ratio is pulled to 1 / (2 beta) nats, up or down."""
    chosen, rejected = batch.chosen.log_ratio, batch.rejected.log_ratio
    losses = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return {"loss": batch.mean(losses), **batch.rewards(beta * chosen, beta * rejected)}
