"""Length-normalized DPO (Tulu 3, Lambert et al. 2024, arXiv 2411.15124, eq. 6).

With h = log-ratio divided by the answer's length:

    -log sigmoid(beta (h_w - h_l))
"""

from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0"}


def loss(batch: Pairs, *, beta: float = 5.0) -> Metrics:
    """beta: strength of the pull towards the reference, per token; the paper found 5."""
    chosen = beta * batch.chosen.log_ratio / batch.chosen.length.clamp(min=1)
    rejected = beta * batch.rejected.log_ratio / batch.rejected.length.clamp(min=1)
    return {"loss": batch.mean(-logsigmoid(chosen - rejected)), **batch.rewards(chosen, rejected)}
