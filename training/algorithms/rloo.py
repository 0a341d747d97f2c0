"""REINFORCE leave-one-out (RLOO; Ahmadian et al. 2024, arXiv 2402.14740, eq. 5 and 7): no critic.

A whole response is one action. Its advantage A is its reward R - kl_coefficient sum_t (log pi - log pi_ref) less the
mean reward of the others in its group (0 in a group of one). With ratio = pi(y|x) / pi_proximal(y|x),

    -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)

is averaged over responses. Clipping is TRL's; in the first step of a training, where the ratio is 1, the gradient is
that of REINFORCE.
"""

from training.algorithm import Advantages, Experience, Metrics, Samples
from training.algorithms import parts

READS = "samples"
NEEDS = ("reference",)
CORRECTIONS = ("sequence", "geometric")
LIMITS = {"clip": "> 0, <= 1", "importance_cap": ">= 0"}


def advantages(experience: Experience) -> Advantages:
    """The penalised reward less the mean of the other responses', at every token."""
    response = experience.response_of_token
    returns = experience.rewards.new_zeros(len(experience.lengths))
    returns = returns.index_add(0, response, parts.penalised_rewards(experience))
    return Advantages(parts.over_other_mean(returns, experience.prompts)[response])


def loss(batch: Samples, *, clip: float = 0.2, importance_cap: float = 0.0) -> Metrics:
    """clip: how far the ratio of a response counts; importance_cap: corrects for the generation engine, by response."""
    ratios = parts.ratio(batch.sum_by_response(batch.logprobs), batch.sum_by_response(batch.proximal))
    # A response has the same advantage at every token: take that of its last.
    losses, clipped = parts.clipped_surrogate(ratios, batch.advantages[batch.lengths.cumsum(0) - 1], clip, clip)
    weights = parts.importance_weight(
        batch.sum_by_response(batch.proximal), batch.sum_by_response(batch.behaviour), importance_cap
    )
    metrics = parts.policy_metrics(batch, batch.mean(ratios), batch.mean(clipped))
    return {"loss": batch.mean(losses * weights), **metrics}
