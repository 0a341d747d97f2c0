"""Kahneman-Tversky optimization (KTO; Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7), from both sides of each pair.

With the log-ratios h, every answer is a sample of its own: the chosen are desirable and the rejected undesirable,

    lambda_D (1 - sigmoid(beta (h_w - z)))   and   lambda_U (1 - sigmoid(beta (z - h_l))),    averaged over the answers.

z estimates KL(pi || pi_ref) and has no gradient: max(0, mean of h over the step's answers). The paper takes that mean
over answers that are paired with the wrong prompts, because its data is not the policy's own. Online, the step's
answers are samples of the policy (picked by score, from both ends), so the mean of their own log-ratios estimates it.
"""

import torch

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0", "lambda_d": "> 0", "lambda_u": "> 0"}


def statistics(batch: Pairs) -> Metrics:
    """The mean log-ratio."""
    return {"log_ratio": batch.mean((batch.chosen.log_ratio + batch.rejected.log_ratio) / 2)}


def loss(batch: Pairs, *, beta: float = 0.1, lambda_d: float = 1.0, lambda_u: float = 1.0) -> Metrics:
    """beta: strength of the pull towards the reference; lambda_d, lambda_u: weights of chosen and rejected answers."""
    z = max(0.0, batch.statistics["log_ratio"])
    chosen = lambda_d * (1 - torch.sigmoid(beta * (batch.chosen.log_ratio - z)))
    rejected = lambda_u * (1 - torch.sigmoid(beta * (z - batch.rejected.log_ratio)))
    return {
        "loss": batch.mean((chosen + rejected) / 2),
        "z": batch.mean(torch.full_like(batch.weights, z)),
        **batch.rewards(beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio),
    }
