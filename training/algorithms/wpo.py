"""Weighted preference optimization (WPO; Zhou et al. 2024, arXiv 2406.11827, eq. 2): DPO as if on-policy.

Each pair has the weight w(y_w) w(y_l), where w(y) measures how likely the policy is to sample y ("sampled alignment"):

    log w(y) = 1/|y| sum_t (log pi(y_t) - log sum_v pi(v)^2)
    -w(y_w) w(y_l) log sigmoid(beta d),    d = log-ratio of the chosen minus log-ratio of the rejected answer

The weights have no gradient and are at most `cap`, which is 1 in the authors' code; TRL has no limit (`cap: 0`).
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from training.algorithm import Answers, Metrics, Pairs
from training.algorithms.parts import LOG_RATIO_LIMIT

READS = "pairs"
NEEDS = ("reference", "collision")
LIMITS = {"beta": "> 0", "cap": ">= 0"}


def loss(batch: Pairs, *, beta: float = 0.1, cap: float = 1.0) -> Metrics:
    """beta: strength of the pull towards the reference; cap: maximum weight of a pair, 0 for no limit."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    weights = (log_weight(batch.chosen) + log_weight(batch.rejected)).clamp(max=LOG_RATIO_LIMIT).exp()
    weights = weights.clamp(max=cap) if cap else weights
    return {
        "loss": batch.mean(-weights * logsigmoid(chosen - rejected)),
        "weight": batch.mean(weights),
        **batch.rewards(chosen, rejected),
    }


def log_weight(answers: Answers) -> Tensor:
    """log w(y) without gradient, [P]; 0 for an empty answer."""
    assert answers.log_collision is not None, 'the algorithm\'s NEEDS lack "collision"'
    return (answers.logp.detach() - answers.log_collision) / answers.length.clamp(min=1)
