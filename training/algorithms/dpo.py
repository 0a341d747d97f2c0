"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

With d = log-ratio of the chosen minus log-ratio of the rejected answer, and label smoothing e ("conservative DPO",
Mitchell 2023, eric-mitchell/direct-preference-optimization):

    -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)
"""

from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0", "label_smoothing": ">= 0, < 0.5"}


def loss(batch: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Metrics:
    """beta: strength of the pull towards the reference; label_smoothing: probability that a label is flipped."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    logits = chosen - rejected
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return {"loss": batch.mean(losses), **batch.rewards(chosen, rejected)}
