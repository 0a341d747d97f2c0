"""Contrastive preference optimization (CPO; Xu et al. 2024, arXiv 2401.08417, eq. 3 to 5): no reference policy.

With label smoothing e, and the negative log-likelihood of the chosen answers' tokens:

    -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) + alpha NLL_w,    d = log pi(y_w|x) - log pi(y_l|x)

NLL is the mean over all chosen tokens of the step, as in the authors' code and TRL's.
"""

from torch.nn.functional import logsigmoid

from training.algorithm import Metrics, Pairs

READS = "pairs"
NEEDS = ()
LIMITS = {"beta": "> 0", "label_smoothing": ">= 0, < 0.5", "alpha": ">= 0"}


def loss(batch: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0, alpha: float = 1.0) -> Metrics:
    """beta: scale of the rewards; label_smoothing: probability that a label is flipped; alpha: weight of the NLL."""
    chosen, rejected = beta * batch.chosen.logp, beta * batch.rejected.logp
    logits = chosen - rejected
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    nll = batch.chosen_nll()
    return {"loss": batch.mean(losses) + alpha * nll, "nll": nll.detach(), **batch.rewards(chosen, rejected)}
