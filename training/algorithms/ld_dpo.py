"""Length-desensitised DPO (LD-DPO; Liu et al. 2024, arXiv 2409.06411).

DPO in which the tokens of the longer answer that lie beyond the length of the shorter one count only `alpha`, under the
policy and the reference alike: with l the length of the shorter answer,

    log pi(y) = sum_{t <= l} log pi(y_t) + alpha sum_{t > l} log pi(y_t)
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.algorithm import Answers, Metrics, Pairs

READS = "pairs"
NEEDS = ("reference", "tokens")
LIMITS = {"beta": "> 0", "alpha": ">= 0, <= 1"}


def loss(batch: Pairs, *, beta: float = 0.1, alpha: float = 0.5) -> Metrics:
    """beta: strength of the pull towards the reference; alpha: weight of the tokens beyond the shorter answer."""
    chosen = beta * log_ratio(batch.chosen, batch.rejected, alpha)
    rejected = beta * log_ratio(batch.rejected, batch.chosen, alpha)
    return {"loss": batch.mean(-logsigmoid(chosen - rejected)), **batch.rewards(chosen, rejected)}


def log_ratio(answers: Answers, others: Answers, alpha: float) -> Tensor:
    """The weighted log-ratio of each answer, [P]."""
    assert answers.logprobs is not None
    beyond = answers.position >= others.length[answers.answer_of_token]
    return answers.sum(torch.where(beyond, alpha, 1.0) * (answers.logprobs - answers.reference))
