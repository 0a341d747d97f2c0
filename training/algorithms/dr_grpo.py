"""GRPO done right (Dr. GRPO; Liu et al. 2025, arXiv 2503.20783): without GRPO's biases by length and by difficulty.

A response's advantage is A = R - mean of its group, without a standard deviation; and with ratio = pi / pi_proximal the
loss

    -min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A)

is summed over each response's tokens and divided by the constant `max_tokens`, not by the response's own length, and
then averaged over responses. There is no KL term, as in the paper.
"""

from training.algorithm import Advantages, Experience, Metrics, Samples
from training.algorithms import parts

READS = "samples"
NEEDS = ()
LIMITS = {"max_tokens": ">= 1", "clip": "> 0, <= 1", "clip_high": "> 0", "importance_cap": ">= 0"}


def advantages(experience: Experience) -> Advantages:
    """Rewards less the mean of each prompt's group, at every token."""
    return Advantages(parts.over_group_mean(experience.rewards, experience.prompts)[experience.response_of_token])


def loss(
    batch: Samples,
    *,
    max_tokens: int = 1024,
    clip: float = 0.2,
    clip_high: float | None = None,
    importance_cap: float = 0.0,
) -> Metrics:
    """max_tokens: usually the maximum response length; clip, clip_high: how far a ratio counts, down and up."""
    ratios = parts.ratio(batch.logprobs, batch.proximal)
    losses, clipped = parts.clipped_surrogate(ratios, batch.advantages, clip, clip if clip_high is None else clip_high)
    losses = losses * parts.importance_weight(batch.proximal, batch.behaviour, importance_cap)
    metrics = parts.policy_metrics(batch, batch.token_mean(ratios), batch.token_mean(clipped))
    return {"loss": batch.mean(batch.sum_by_response(losses) / max_tokens), **metrics}
