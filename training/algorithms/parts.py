"""Building blocks of several algorithms. Shapes: S responses, N tokens (those of all responses, concatenated)."""

import torch
from torch import Tensor

from training.algorithm import Experience, Metrics, Samples, missing_need, owners

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this magnitude before the exponential, which overflows in fp32 at 89."""


def penalised_rewards(experience: Experience) -> Tensor:
    """Reward of each token, [N]: -kl_coefficient (log pi - log pi_ref), and at the last token the response's reward.

    Ziegler et al. 2019, arXiv 1909.08593, eq. 2, as InstructGPT spreads it over the tokens (arXiv 2203.02155). pi is
    the policy that sampled. A truncated response gets its reward at its last token like any other.
    """
    return kl_penalties(experience).index_add(0, experience.lengths.cumsum(0) - 1, experience.rewards)


def kl_penalties(experience: Experience) -> Tensor:
    """The part of each token's reward that keeps the policy near the reference, [N]: -kl_coefficient (log pi - log
    pi_ref)."""
    if experience.reference is None:
        raise missing_need("reference")
    return -experience.kl_coefficient * (experience.behaviour - experience.reference)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16), [N].

    A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t; after the last token V and A are 0.

    Args:
        rewards: reward of each token, [N].
        values: value of the state in which each token was chosen, [N].
        lengths: tokens of each response, at least 1, [S].
    """
    response = owners(lengths, len(rewards))
    position = torch.arange(len(rewards), device=lengths.device) - (lengths.cumsum(0) - lengths)[response]
    padded = rewards.new_zeros(2, int(lengths.max()) + 1, len(lengths))
    padded[:, position, response] = torch.stack([rewards, values])
    reward, value = padded
    deltas = reward[:-1] + gamma * value[1:] - value[:-1]  # 0 in the padding
    advantages = torch.empty_like(deltas)
    following = torch.zeros_like(deltas[0])
    for step in reversed(range(len(deltas))):
        following = deltas[step] + gamma * lam * following
        advantages[step] = following
    return advantages[position, response]


def discounted_sums(rewards: Tensor, lengths: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token on, [N]."""
    return gae(rewards, torch.zeros_like(rewards), lengths, gamma, 1.0)


def whiten(values: Tensor) -> Tensor:
    """Normalize to mean 0 and variance 1 as in TRL's PPO (unbiased variance + 1e-8); 0 if all values are equal."""
    centred = values - values.mean()
    return centred * torch.rsqrt(centred.square().sum() / max(len(values) - 1, 1) + 1e-8)


def group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """For each response the sum over its group, [S]; `groups` are indices from 0."""
    return values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values)[groups]


def group_sizes(groups: Tensor) -> Tensor:
    """For each response the size of its group, [S], integers."""
    return group_sums(torch.ones_like(groups), groups)


def over_group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Each value less its group's mean, [S]."""
    return values - group_sums(values, groups) / group_sizes(groups)


def over_other_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Each value less the mean of the others in its group ("leave one out"), [S]; 0 in a group of one."""
    sizes = group_sizes(groups)
    return over_group_mean(values, groups) * sizes / (sizes - 1).clamp(min=1)


def group_std(values: Tensor, groups: Tensor) -> Tensor:
    """For each response the (unbiased) standard deviation of its group, [S]; 0 in a group of one."""
    squares = over_group_mean(values, groups).square()
    return (group_sums(squares, groups) / (group_sizes(groups) - 1).clamp(min=1)).sqrt()


def ratio(logprobs: Tensor, old: Tensor) -> Tensor:
    """pi / pi_old from log-probabilities, of the same shape; clamped to e^-20 to e^20, with gradient 0 outside."""
    return (logprobs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(ratios: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's loss (Schulman et al. 2017, arXiv 1707.06347, eq. 7), and where it is clipped.

    -min(ratio A, clip(ratio, 1 - low, 1 + high) A), and 1 where the second term is less, else 0; both of the shape of
    `ratios`.
    """
    free, clipped = -ratios * advantages, -ratios.clamp(1 - low, 1 + high) * advantages
    return torch.maximum(free, clipped), (clipped > free).to(ratios.dtype)


def importance_weight(proximal: Tensor, behaviour: Tensor, cap: float) -> Tensor | float:
    """min(pi_proximal / pi_behaviour, cap) without gradient, of their shape; 1 if `cap` is 0.

    It corrects for an engine whose probabilities differ from the trainer's: truncated importance sampling (Ionides
    2008; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    return ratio(proximal, behaviour).clamp(max=cap).detach() if cap else 1.0


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Nonnegative estimate "k3" of KL(pi || pi_ref) per token, from a sample of pi.

    pi_ref / pi - log(pi_ref / pi) - 1, of the shape of `logprobs` (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = (reference - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio) - log_ratio


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Squared error of a critic that may move by at most `clip` from its old values, [N].

    max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2) / 2, as in OpenAI's baselines and TRL's PPO.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def policy_metrics(batch: Samples, ratio: Tensor, clip_fraction: Tensor | None = None) -> Metrics:
    """The usual metrics of policy training; `ratio` and `clip_fraction` are shares of the step's means, []."""
    return {
        **({} if clip_fraction is None else {"clip_fraction": clip_fraction}),
        "ratio": ratio.detach(),
        "approx_kl": batch.token_mean(kl_k3(batch.proximal, batch.logprobs.detach())),
        "entropy": batch.token_mean(batch.entropy.detach()),
    }


def actor_critic(
    batch: Samples,
    policy_loss: Tensor,
    entropy_coefficient: float,
    value_coefficient: float = 0.0,
    value_clip: float = 0.0,
) -> Metrics:
    """The policy loss minus the entropy bonus, plus the value loss if policy and critic share a backbone.

    (arXiv 1707.06347, eq. 9.)
    """
    metrics = {"loss": policy_loss, "policy_loss": policy_loss.detach()}
    if entropy_coefficient:
        metrics["loss"] = metrics["loss"] - entropy_coefficient * batch.token_mean(batch.entropy)
    if batch.values is not None:
        assert batch.old_values is not None
        assert batch.returns is not None
        losses = clipped_value_loss(batch.values, batch.old_values, batch.returns, value_clip)
        metrics["value_loss"] = batch.token_mean(losses.detach())
        metrics["loss"] = metrics["loss"] + value_coefficient * batch.token_mean(losses)
    return metrics
