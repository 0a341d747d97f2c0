"""DPO with a beta for each step (beta-DPO; Wu et al. 2024, arXiv 2407.08639), and without the outliers among its pairs.

A pair's gap M is the log-ratio of the chosen minus that of the rejected answer. Moving averages of the step's mean gap
and of its standard deviation,

    M_0 <- momentum M_0 + (1 - momentum) mean(M),    sigma <- momentum sigma + (1 - momentum) std(M),

start at 0. The share `filtering` of the step's pairs is left out: those to train on are drawn without replacement, with
probabilities proportional to exp(-(M - M_0)^2 / (2 sigma^2)). The loss is the mean over these of

    -log sigmoid(beta_step M),    beta_step = max(beta (1 + alpha (mean(M) - M_0)), 0.001)

where mean(M) is that of the drawn pairs, as in the authors' code. sigma is at least 0.01 nats: while the policy still
equals the reference, gaps are rounding errors, which must not decide what is left out.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs, Statistics, Step

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0", "alpha": ">= 0", "filtering": ">= 0, < 1", "momentum": ">= 0, < 1"}
STATE = {"gap_mean": 0.0, "gap_std": 0.0}


def statistics(batch: Pairs) -> Metrics:
    """The gap of every pair of the step."""
    return {"gaps": batch.gather(batch.chosen.log_ratio - batch.rejected.log_ratio)}


def update(
    step: Step, *, beta: float = 0.1, alpha: float = 0.6, filtering: float = 0.2, momentum: float = 0.9
) -> Statistics:
    """alpha: how far beta follows the gap; filtering: share left out; momentum: that of the moving averages."""
    gaps = torch.as_tensor(step.statistics["gaps"])
    new = {"gap_mean": gaps.mean(), "gap_std": gaps.std() if len(gaps) > 1 else gaps.new_zeros(())}
    kept = {name: momentum * step.state[name] + (1 - momentum) * float(value) for name, value in new.items()}
    likely = -0.5 * ((gaps - kept["gap_mean"]) / max(kept["gap_std"], 0.01)).square()
    chosen = gumbel_top(likely, max(1, int(len(gaps) * (1 - filtering))), step.generator)
    dynamic = beta * (1 + alpha * (float(gaps[chosen].mean()) - kept["gap_mean"]))
    used = torch.zeros_like(gaps).index_fill(0, chosen, 1.0)
    return {**kept, "beta": max(dynamic, 1e-3), "pairs_used": len(chosen), "used": used}


def loss(batch: Pairs) -> Metrics:
    """The loss of the pairs that are used, by the step's beta."""
    beta, used = batch.statistics["beta"], batch.own(torch.as_tensor(batch.statistics["used"]))
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    share = used * (batch.total / batch.statistics["pairs_used"])
    losses = -logsigmoid(chosen - rejected) * share.to(chosen.dtype)
    return {"loss": batch.mean(losses), **batch.rewards(chosen, rejected)}


def gumbel_top(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count` entries drawn without replacement by exp(log_weights) (Kool et al. 2019, Gumbel top-k)."""
    uniform = torch.rand(len(log_weights), generator=generator, dtype=torch.float64).clamp(min=1e-300)
    return (log_weights - (-uniform.log()).log()).topk(count).indices
