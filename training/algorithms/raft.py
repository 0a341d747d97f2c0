"""Reward ranked fine-tuning (RAFT; Dong et al. 2023, arXiv 2304.06767): supervised training on the best of K.

Of the responses to each prompt, the one with the greatest reward is kept (the first of equal ones), and the loss is

    -log pi(y_t)    averaged over the tokens of the kept responses.
"""

import torch

from training.algorithm import Advantages, Experience, Metrics, Samples
from training.algorithms import parts

READS = "samples"
NEEDS = ()
CORRECTIONS = ()


def advantages(experience: Experience) -> Advantages:
    """1 at every token; only the best response to each prompt is kept."""
    rewards, prompts = experience.rewards, experience.prompts
    count, numbers = int(prompts.max()) + 1, torch.arange(len(rewards))
    best = rewards.new_full((count,), -torch.inf).scatter_reduce(0, prompts, rewards, "amax")[prompts]
    candidates = torch.where(rewards == best, numbers, len(rewards))
    first = candidates.new_full((count,), len(rewards)).scatter_reduce(0, prompts, candidates, "amin")[prompts]
    return Advantages(torch.ones_like(experience.behaviour), keep=numbers == first)


def loss(batch: Samples) -> Metrics:
    """Negative log-likelihood per token."""
    ratios = parts.ratio(batch.logprobs, batch.proximal)
    metrics = parts.policy_metrics(batch, batch.token_mean(ratios))
    return {"loss": batch.token_mean(-batch.logprobs), **metrics}
