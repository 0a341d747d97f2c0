"""Importance correction: weights for samples that a policy other than the trained one has generated.

With l_t = log pi(y_t | ...) - log mu(y_t | ...) for each of an answer's T tokens, pi the policy at the start of the
training (`proximal`, computed by the trainer) and mu the one that sampled (`behaviour`, reported by its engine), the
ratio of a token is

    token      exp(l_t)
    sequence   exp(sum_t l_t)        the same for all tokens of the answer
    geometric  exp(sum_t l_t / T)    likewise

The product over a sequence is the importance weight of an answer: its estimate is unbiased, with a variance that grows
exponentially in T. A single token's ratio has little variance but is biased, since it ignores the ratio of the prefix
(Precup, Sutton, Singh 2000, "Eligibility traces for off-policy policy evaluation"). The geometric mean is comparable
between answers of different lengths (GSPO, arXiv 2507.18071, eq. 7). The weight of a ratio r is

    truncate   min(max(r, low), high)           truncated importance sampling (Ionides 2008, "Truncated importance
                                                sampling"; Yao et al. 2025, "Your efficient RL framework secretly brings
                                                you off-policy RL training")
    mask       r if low <= r <= high, else 0    masked importance sampling (IcePop; Ring-1T, arXiv 2510.18855)

The weight has no gradient and multiplies the advantages. This scales what is learned from the reward: a clipped
surrogate min(r A, clip(r) A) is linear in a nonnegative weight of A. Other terms of the loss (a divergence from the
reference, entropy, the value loss) are not weighted. TRL's `vllm_importance_sampling_mode` does the same.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from modeling.rows import Response
from training.config import CorrectionSection

Numbers: TypeAlias = NDArray[np.float64]
LOG_RATIO_LIMIT = 20.0
"""Ratios are clipped to e^-20 to e^20, as in `training.algorithms.parts.ratio`."""
TREATED = {"truncate": "truncated", "mask": "masked"}


def correct(responses: list[Response], section: CorrectionSection) -> dict[str, float]:
    """Multiply the advantages of all responses by their weights, and compute metrics of the weights.

    Returns:
        correction_weight: mean of the weights; correction_truncated or correction_masked: share of the ratios outside
        of the bounds; correction_effective: effective sample size over the number of samples, (sum w)^2 / (n sum w^2)
        (Kish 1965), 0 if every weight is 0. Each is over all tokens at level "token", otherwise over all answers.
    """
    logs = [response.tokens["proximal"].astype(float) - response.tokens["behaviour"] for response in responses]
    ratios = [ratios_of(each, section.level) for each in logs]
    weights = [weights_of(each, section) for each in ratios]
    for response, weight in zip(responses, weights, strict=True):
        response.tokens["advantages"] = (response.tokens["advantages"] * weight).astype(np.float32)
    return summary(np.concatenate(ratios), np.concatenate(weights), section)


def ratios_of(logs: Numbers, level: str) -> Numbers:
    """Ratios of an answer, from its tokens' log-ratios `logs`: one per token, [T], or one for the whole answer, [1]."""
    if level != "token":
        logs = (logs.sum() if level == "sequence" else logs.mean()).reshape(1)
    found: Numbers = np.exp(logs.clip(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return found


def weights_of(ratios: Numbers, section: CorrectionSection) -> Numbers:
    """Weights for the ratios, of the same shape."""
    if section.treatment == "truncate":
        return ratios.clip(section.low, section.high)
    return np.where(_outside(ratios, section), 0.0, ratios)


def summary(ratios: Numbers, weights: Numbers, section: CorrectionSection) -> dict[str, float]:
    """The metrics that `correct` returns."""
    squares = float(np.square(weights).sum()) * len(weights)
    return {
        "correction_weight": float(weights.mean()),
        f"correction_{TREATED[section.treatment]}": float(_outside(ratios, section).mean()),
        "correction_effective": float(weights.sum()) ** 2 / squares if squares else 0.0,
    }


def _outside(ratios: Numbers, section: CorrectionSection) -> NDArray[np.bool_]:
    return (ratios < section.low) | (ratios > section.high)
