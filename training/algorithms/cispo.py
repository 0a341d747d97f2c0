"""Clipped importance sampling policy optimization (CISPO; MiniMax-M1 2025, arXiv 2506.13585, eq. 4 and 5): no critic.

PPO's clipping removes the gradient of clipped tokens; here only their weight is clipped, and every token contributes.
With ratio = pi / pi_proximal, held constant in the gradient, and GRPO's advantages A:

    -clip(ratio, 1 - clip_low, 1 + clip_high) A log pi

averaged over all tokens of the step. As in the paper there is no KL term, and by default no lower bound; the default
upper bound, a weight of 5, is that of ScaleRL (arXiv 2510.13786).
"""

from training.algorithm import Metrics, Samples
from training.algorithms import parts
from training.algorithms.grpo import advantages as advantages

READS = "samples"
NEEDS = ()
LIMITS = {"clip_high": "> 0", "clip_low": "> 0, <= 1", "entropy_coefficient": ">= 0", "importance_cap": ">= 0"}


def loss(
    batch: Samples,
    *,
    clip_high: float = 4.0,
    clip_low: float | None = None,
    entropy_coefficient: float = 0.0,
    importance_cap: float = 0.0,
) -> Metrics:
    """clip_high, clip_low: how far above and below 1 a token's weight may be."""
    ratios = parts.ratio(batch.logprobs, batch.proximal)
    weights = ratios.detach().clamp(0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)
    losses = -weights * batch.advantages * batch.logprobs
    losses = losses * parts.importance_weight(batch.proximal, batch.behaviour, importance_cap)
    metrics = parts.actor_critic(batch, batch.token_mean(losses), entropy_coefficient)
    clipped = (weights != ratios.detach()).to(weights.dtype)
    return metrics | parts.policy_metrics(batch, batch.token_mean(ratios), batch.token_mean(clipped))
