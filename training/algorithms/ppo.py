"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) as RLHF uses it (arXiv 1909.08593, 2203.02155).

Each token's reward is -kl_coefficient (log pi - log pi_ref), plus the response's reward at its last token; generalized
advantage estimation on the critic's values (arXiv 1506.02438), whitened over all tokens of the iteration; then, with
ratio = pi / pi_proximal,

    -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) - entropy_coefficient H

averaged over tokens. If policy and critic share a backbone, value_coefficient times the clipped value loss is added;
otherwise the critic is trained on `returns` separately. A truncated response is treated like any other: its reward is
at the last token, and the value after it is 0 instead of bootstrapped (as in TRL and OpenRLHF).
"""

from training.algorithm import Advantages, Experience, Metrics, Samples
from training.algorithms import parts

READS = "samples"
NEEDS = ("reference", "values")
LIMITS = {
    "gamma": ">= 0, <= 1",
    "lam": ">= 0, <= 1",
    "clip": "> 0, <= 1",
    "entropy_coefficient": ">= 0",
    "value_coefficient": ">= 0",
    "value_clip": "> 0",
    "importance_cap": ">= 0",
}


def advantages(experience: Experience, *, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True) -> Advantages:
    """gamma: discount per token; lam: GAE's, from bias (0) to variance (1); whiten: to mean 0 and variance 1."""
    assert experience.values is not None
    rewards = parts.penalised_rewards(experience)
    found = parts.gae(rewards, experience.values, experience.lengths, gamma, lam)
    return Advantages(parts.whiten(found) if whiten else found, returns=found + experience.values)


def loss(
    batch: Samples,
    *,
    clip: float = 0.2,
    entropy_coefficient: float = 0.0,
    value_coefficient: float = 0.1,
    value_clip: float = 0.2,
    importance_cap: float = 0.0,
) -> Metrics:
    """clip: how far ratios count; importance_cap: corrects for the generation engine, see `parts.importance_weight`."""
    ratios = parts.ratio(batch.logprobs, batch.proximal)
    losses, clipped = parts.clipped_surrogate(ratios, batch.advantages, clip, clip)
    losses = losses * parts.importance_weight(batch.proximal, batch.behaviour, importance_cap)
    metrics = parts.actor_critic(batch, batch.token_mean(losses), entropy_coefficient, value_coefficient, value_clip)
    return metrics | parts.policy_metrics(batch, batch.token_mean(ratios), batch.token_mean(clipped))
