"""Group relative policy optimization (GRPO; DeepSeekMath, Shao et al. 2024, arXiv 2402.03300, eq. 3 and 4): no critic.

A response's advantage, at each of its tokens, is its reward relative to those of the other responses to the prompt,

    A = (R - mean of the group) / (standard deviation of the group + 1e-4)

(the unbiased deviation, as in TRL; 0 for a group of one), and the loss, with ratio = pi / pi_proximal,

    -min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A) + beta KL(pi || pi_ref)

averaged over each response's tokens, and then over responses. KL is the estimate "k3".
"""

from training.algorithm import Advantages, Experience, Metrics, Samples
from training.algorithms import parts

READS = "samples"
NEEDS = ("reference",)
LIMITS = {
    "beta": ">= 0",
    "clip": "> 0, <= 1",
    "clip_high": "> 0",
    "entropy_coefficient": ">= 0",
    "importance_cap": ">= 0",
}


def advantages(experience: Experience) -> Advantages:
    """Rewards normalized within each prompt's group, at every token."""
    relative = parts.over_group_mean(experience.rewards, experience.prompts)
    relative = relative / (parts.group_std(experience.rewards, experience.prompts) + 1e-4)
    return Advantages(relative[experience.response_of_token])


def loss(
    batch: Samples,
    *,
    beta: float = 0.04,
    clip: float = 0.2,
    clip_high: float | None = None,
    entropy_coefficient: float = 0.0,
    importance_cap: float = 0.0,
) -> Metrics:
    """beta: weight of the KL term; clip, clip_high: how far a ratio counts, down and up (DAPO, arXiv 2503.14476)."""
    assert batch.reference is not None
    ratios = parts.ratio(batch.logprobs, batch.proximal)
    losses, clipped = parts.clipped_surrogate(ratios, batch.advantages, clip, clip if clip_high is None else clip_high)
    kl = parts.kl_k3(batch.logprobs, batch.reference)
    losses = losses * parts.importance_weight(batch.proximal, batch.behaviour, importance_cap) + beta * kl
    policy_loss = batch.mean(batch.sum_by_response(losses) / batch.lengths)
    return {
        **parts.actor_critic(batch, policy_loss, entropy_coefficient),
        **parts.policy_metrics(batch, batch.token_mean(ratios), batch.token_mean(clipped)),
        "kl": batch.token_mean(kl.detach()),
    }
