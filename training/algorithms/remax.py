"""ReMax (Li et al. 2023, arXiv 2310.10505): REINFORCE with the greedy answer's reward as baseline, and no critic.

With the reward R of a response and R_greedy of the greedy answer to its prompt, the advantage of a token is

    A_t = R - R_greedy - kl_coefficient sum_{t' >= t} (log pi - log pi_ref)

and the loss -sum_t A_t log pi(y_t), averaged over responses. It is meant for one pass over the samples.
"""

from training.algorithm import Advantages, Experience, Metrics, Samples
from training.algorithms import parts

READS = "samples"
NEEDS = ("reference", "greedy")
LIMITS = {"importance_cap": ">= 0"}


def advantages(experience: Experience) -> Advantages:
    """The penalised return of each token less the greedy answer's reward."""
    assert experience.greedy is not None
    returns = parts.discounted_sums(parts.penalised_rewards(experience), experience.lengths, 1.0)
    return Advantages(returns - experience.greedy[experience.response_of_token])


def loss(batch: Samples, *, importance_cap: float = 0.0) -> Metrics:
    """importance_cap: corrects for the generation engine, see `parts.importance_weight`."""
    weights = parts.importance_weight(batch.proximal, batch.behaviour, importance_cap)
    losses = -batch.advantages * batch.logprobs * weights
    ratios = parts.ratio(batch.logprobs, batch.proximal)
    metrics = parts.policy_metrics(batch, batch.token_mean(ratios))
    return {"loss": batch.mean(batch.sum_by_response(losses)), **metrics}
