"""Sequence likelihood calibration (SLiC-HF, Zhao et al. 2023, arXiv 2305.10425), normalized by the reference policy.

With d = log-ratio of the chosen minus log-ratio of the rejected answer, as RSO has it (arXiv 2309.06657):

    max(0, 1 - beta d)
"""

from torch import relu

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0"}


def loss(batch: Pairs, *, beta: float = 0.1) -> Metrics:
    """beta: inverse of the target margin, in nats."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    return {"loss": batch.mean(relu(1 - (chosen - rejected))), **batch.rewards(chosen, rejected)}
