"""Binary classifier optimization (BCO; Jung et al. 2024, arXiv 2404.04656).

With the implicit rewards r = beta log-ratio and their mean delta over both answers of the step's pairs, which is held
constant in the gradient (the paper has a running mean; TRL's `bco_pair` has no delta: `reward_shift: false`):

    -log sigmoid(r_w - delta) - log sigmoid(-(r_l - delta))
"""

from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0"}


def statistics(batch: Pairs, *, beta: float = 0.1) -> Metrics:
    """The mean reward."""
    return {"delta": batch.mean(beta * (batch.chosen.log_ratio + batch.rejected.log_ratio) / 2)}


def loss(batch: Pairs, *, beta: float = 0.1, reward_shift: bool = True) -> Metrics:
    """beta: strength of the pull towards the reference; reward_shift: whether rewards are compared with their mean."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    delta = batch.statistics["delta"] if reward_shift else 0.0
    losses = -logsigmoid(chosen - delta) - logsigmoid(delta - rejected)
    return {"loss": batch.mean(losses), **batch.rewards(chosen, rejected)}
