"""PPO on token rewards, such as those at the ends of steps (Math-Shepherd, Wang et al. 2024, arXiv 2312.08935).

A token's reward is the scorer's reward for it, less kl_coefficient (log pi - log pi_ref). The reward of the whole
answer, which `ppo` adds at the last token, is not used. Everything else is as in `ppo`.
"""

from training.algorithm import Advantages, Experience
from training.algorithms import parts
from training.algorithms.ppo import loss as loss

READS = "samples"
NEEDS = ("reference", "values", "token_rewards")
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
    assert experience.token_rewards is not None
    rewards = parts.kl_penalties(experience) + experience.token_rewards
    found = parts.gae(rewards, experience.values, experience.lengths, gamma, lam)
    return Advantages(parts.whiten(found) if whiten else found, returns=found + experience.values)
