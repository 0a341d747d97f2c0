"""DPO with down-sampled tokens (SamPO; Lu et al. 2024, arXiv 2406.10957): length alone earns nothing.

Only as many tokens of a pair's longer answer count as the shorter one has, drawn at random in each step. With h the sum
of the log-ratios of the tokens that count:

    -log sigmoid(beta (h_w - h_l))
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.algorithm import Answers, Metrics, Pairs

READS = "pairs"
NEEDS = ("reference", "tokens")
LIMITS = {"beta": "> 0"}


def loss(batch: Pairs, *, beta: float = 0.1) -> Metrics:
    """beta: strength of the pull towards the reference."""
    chosen, rejected = beta * sampled(batch.chosen, batch.rejected), beta * sampled(batch.rejected, batch.chosen)
    return {"loss": batch.mean(-logsigmoid(chosen - rejected)), **batch.rewards(chosen, rejected)}


def sampled(answers: Answers, others: Answers) -> Tensor:
    """The log-ratio of each answer over as many of its tokens as the other has, [P]."""
    assert answers.logprobs is not None
    answer = answers.answer_of_token
    shuffled = (answer + answers.random()).argsort()  # the tokens of each answer, among themselves
    kept = torch.zeros_like(answers.logprobs).index_copy(
        0, shuffled, (answers.position < others.length[answer]).to(answers.logprobs.dtype)
    )
    return answers.sum(kept * (answers.logprobs - answers.reference))
