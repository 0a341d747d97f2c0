"""REINFORCE++ (Hu 2025, arXiv 2501.03262): PPO's loss with plain returns for advantages and no critic.

Each token's reward is -kl_coefficient (log pi - log pi_ref), plus the response's reward at its last token; its
advantage is the discounted sum from it on, normalized over all tokens of the iteration. With ratio = pi / pi_proximal,

    -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)

averaged over tokens.
"""

from training.algorithm import Advantages, Experience, Metrics, Samples
from training.algorithms import parts

READS = "samples"
NEEDS = ("reference",)
LIMITS = {"gamma": ">= 0, <= 1", "clip": "> 0, <= 1", "entropy_coefficient": ">= 0", "importance_cap": ">= 0"}


def advantages(experience: Experience, *, gamma: float = 1.0) -> Advantages:
    """gamma: discount per token."""
    returns = parts.discounted_sums(parts.penalised_rewards(experience), experience.lengths, gamma)
    return Advantages(parts.whiten(returns))


def loss(
    batch: Samples, *, clip: float = 0.2, entropy_coefficient: float = 0.0, importance_cap: float = 0.0
) -> Metrics:
    """clip: how far ratios count; importance_cap: corrects for the generation engine, see `parts.importance_weight`."""
    ratios = parts.ratio(batch.logprobs, batch.proximal)
    losses, clipped = parts.clipped_surrogate(ratios, batch.advantages, clip, clip)
    losses = losses * parts.importance_weight(batch.proximal, batch.behaviour, importance_cap)
    metrics = parts.actor_critic(batch, batch.token_mean(losses), entropy_coefficient)
    return metrics | parts.policy_metrics(batch, batch.token_mean(ratios), batch.token_mean(clipped))
