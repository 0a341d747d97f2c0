"""PPO for stale samples, decoupled (Hilton et al. 2021, arXiv 2110.00641; AReaL, arXiv 2505.24298, eq. 5).

The policy is kept near the proximal policy (the policy at the start of this training), no matter which policy sampled:

    -pi_proximal / pi_behaviour  min(ratio A, clip(ratio, 1 - clip, 1 + clip) A),    ratio = pi / pi_proximal

averaged over tokens; the first factor has no gradient, and tokens where it is above `behaviour_cap` are left out, as in
AReaL's code. Advantages, entropy and value loss are those of `ppo`.
"""

from training.algorithm import Metrics, Samples
from training.algorithms import parts
from training.algorithms.ppo import advantages as advantages

READS = "samples"
NEEDS = ("reference", "values")
OFF_POLICY = True
LIMITS = {
    "clip": "> 0, <= 1",
    "behaviour_cap": "> 0",
    "entropy_coefficient": ">= 0",
    "value_coefficient": ">= 0",
    "value_clip": "> 0",
}


def loss(
    batch: Samples,
    *,
    clip: float = 0.2,
    behaviour_cap: float = 5.0,
    entropy_coefficient: float = 0.0,
    value_coefficient: float = 0.1,
    value_clip: float = 0.2,
) -> Metrics:
    """clip: how far a ratio counts; behaviour_cap: tokens with a greater weight than this are left out."""
    ratios = parts.ratio(batch.logprobs, batch.proximal)
    losses, clipped = parts.clipped_surrogate(ratios, batch.advantages, clip, clip)
    weights = parts.ratio(batch.proximal, batch.behaviour).detach()
    used = (weights <= behaviour_cap).to(weights.dtype)
    policy_loss = batch.token_mean(losses * weights * used)
    metrics = parts.actor_critic(batch, policy_loss, entropy_coefficient, value_coefficient, value_clip)
    return {
        **metrics,
        **parts.policy_metrics(batch, batch.token_mean(ratios), batch.token_mean(clipped)),
        "behaviour_weight": batch.token_mean(weights * used),
        "left_out": batch.token_mean(1 - used),
    }
