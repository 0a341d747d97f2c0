"""Identity preference optimization (Azar et al. 2023, arXiv 2310.12036, eq. 17, with beta for the paper's tau).

With h = log-ratio divided by the answer's length, as its authors recommend for language models:

    (h_w - h_l - 1 / (2 beta))^2
"""

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0"}


def loss(batch: Pairs, *, beta: float = 0.1) -> Metrics:
    """beta: the target margin is 1 / (2 beta) nats per token."""
    chosen = batch.chosen.log_ratio / batch.chosen.length.clamp(min=1)
    rejected = batch.rejected.log_ratio / batch.rejected.length.clamp(min=1)
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return {"loss": batch.mean(losses), **batch.rewards(beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio)}
