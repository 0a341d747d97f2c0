"""The losses: pure functions from log-probabilities or scores to one value per row."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class DpoLosses(NamedTuple):
    """Per pair, each of shape [pairs]."""

    loss: Tensor
    chosen_reward: Tensor
    """Implicit reward beta * log(policy / reference) of the chosen answer, without gradient."""
    rejected_reward: Tensor


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float,
    kind: Literal["sigmoid", "hinge", "ipo"],
    label_smoothing: float = 0.0,
) -> DpoLosses:
    """Direct preference optimisation and two relatives.

    With the log-ratios h_w = log pi(y_w|x) - log pi_ref(y_w|x), h_l likewise, and d = h_w - h_l:

        sigmoid  -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)     Rafailov et al. 2023, arXiv 2305.18290;
                 e: label smoothing, "conservative DPO" (Mitchell 2023)
        hinge    max(0, 1 - beta d)                                       SLiC-HF, arXiv 2305.10425, as RSO has it
        ipo      (h_w / |y_w| - h_l / |y_l| - 1 / (2 beta))^2             Azar et al. 2023, arXiv 2310.12036, eq. 17,
                 with log-ratios averaged over tokens, as its authors recommend

    Args:
        chosen: summed log-probabilities of the chosen responses (nats), [pairs]; the other arguments likewise.
        chosen_length: response tokens, [pairs].
    """
    chosen_ratio = chosen - reference_chosen
    rejected_ratio = rejected - reference_rejected
    if kind == "sigmoid":
        logits = beta * (chosen_ratio - rejected_ratio)
        loss = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    elif kind == "hinge":
        loss = torch.relu(1 - beta * (chosen_ratio - rejected_ratio))
    else:
        loss = (chosen_ratio / chosen_length - rejected_ratio / rejected_length - 1 / (2 * beta)) ** 2
    return DpoLosses(loss, beta * chosen_ratio.detach(), beta * rejected_ratio.detach())


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l) per pair, [pairs] (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1)."""
    return -logsigmoid(chosen - rejected)
