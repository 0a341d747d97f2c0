"""Simple preference optimization (SimPO; Meng, Xia & Chen 2024, arXiv 2405.14734, eq. 6): no reference policy.

With the rewards r = beta log pi(y|x) / |y|:

    -log sigmoid(r_w - r_l - gamma)
"""

from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ()
LIMITS = {"beta": "> 0", "gamma": ">= 0"}


def loss(batch: Pairs, *, beta: float = 2.0, gamma: float = 1.0) -> Metrics:
    """beta: scale of the rewards; gamma: target margin between them (the paper: 0.3 to 0.8 times beta)."""
    chosen, rejected = beta * batch.chosen.mean_logp, beta * batch.rejected.mean_logp
    return {"loss": batch.mean(-logsigmoid(chosen - rejected - gamma)), **batch.rewards(chosen, rejected)}
