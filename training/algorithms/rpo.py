"""DPO with a likelihood term ("Iterative RPO"; Pang et al. 2024, arXiv 2404.19733, eq. 1).

With d = log-ratio of the chosen minus log-ratio of the rejected answer:

    -log sigmoid(beta d) - alpha log pi(y_w|x) / |y_w|

Each chosen answer counts alike here; `nll_coefficient` of the training is the mean over all chosen tokens instead.
"""

from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0", "alpha": ">= 0"}


def loss(batch: Pairs, *, beta: float = 0.1, alpha: float = 1.0) -> Metrics:
    """beta: strength of the pull towards the reference; alpha: weight of the likelihood term."""
    chosen, rejected = beta * batch.chosen.log_ratio, beta * batch.rejected.log_ratio
    nll = -batch.chosen.mean_logp
    return {
        "loss": batch.mean(-logsigmoid(chosen - rejected) + alpha * nll),
        "nll": batch.mean(nll.detach()),
        **batch.rewards(chosen, rejected),
    }
