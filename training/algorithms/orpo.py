"""Odds ratio preference optimization (ORPO; Hong, Lee & Thorne 2024, arXiv 2403.07691, eq. 4 to 7): no reference.

With p = exp(log pi(y|x) / |y|), odds = p / (1 - p), and the negative log-likelihood of the chosen answers' tokens:

    NLL_w - lam log sigmoid(log(odds_w / odds_l))

NLL is the mean over all chosen tokens of the step (TRL's includes those of the prompt). p is at most 1 - 1e-6.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ()
LIMITS = {"lam": "> 0"}


def loss(batch: Pairs, *, lam: float = 0.1) -> Metrics:
    """lam: weight of the odds ratio."""
    log_odds_ratio = log_odds(batch.chosen.mean_logp) - log_odds(batch.rejected.mean_logp)
    nll = batch.chosen_nll()
    return {
        "loss": nll + batch.mean(-lam * logsigmoid(log_odds_ratio)),
        "nll": nll.detach(),
        **batch.rewards(lam * batch.chosen.mean_logp, lam * batch.rejected.mean_logp),
    }


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    logp = logp.clamp(max=-1e-6)
    return logp - torch.log(-torch.expm1(logp))
