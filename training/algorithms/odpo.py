"""DPO with an offset (ODPO; Amini, Vieira & Cotterell 2024, arXiv 2402.10571): margin-aware.

With d = log-ratio of the chosen minus log-ratio of the rejected answer, and the scores s that the pair was chosen by:

    -log sigmoid(beta d - Delta),    Delta = alpha f(s_w - s_l)

f is the logarithm, as in most of the paper (differences below 1e-6 count as that), or the difference itself.
"""

from typing import Literal

from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0", "alpha": ">= 0"}


def loss(batch: Pairs, *, beta: float = 0.1, alpha: float = 1.0, f: Literal["log", "identity"] = "log") -> Metrics:
    """beta: strength of the pull towards the reference; alpha: weight of the offset; f: function of the scores."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    difference = batch.chosen.score - batch.rejected.score
    offset = alpha * (difference.clamp(min=1e-6).log() if f == "log" else difference)
    return {
        "loss": batch.mean(-logsigmoid(chosen - rejected - offset)),
        "offset": batch.mean(offset),
        **batch.rewards(chosen, rejected),
    }
