"""The experience stage: computes advantages and returns for every response token from scored samples.

All samples of an iteration are processed together, in fp64 on the CPU, in flat arrays: normalization over the whole
batch, or over all answers to a prompt, then does not depend on how the training divides its work.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.jsonl import write_jsonl
from contracts.records import EXPERIENCE, ROLLOUTS, ExperienceRow, ExperienceSample, Rollout
from contracts.stage import Context, Outcome
from training import algorithm, registry
from training.columns import Columns, WatchedExperience, collect
from training.config import ExperienceConfig

SHARD = "shard-00000.jsonl"
KL_COEFFICIENT = 0.05
"""The default coefficient, as in TRL's PPO."""
MAX_RELATIVE_ERROR = 0.2
"""Bound on the KL divergence's relative distance from its target, by which an adaptive coefficient changes."""


def run(config: ExperienceConfig, context: Context) -> Outcome:
    """Join rollouts and scores, check that they belong together, call the algorithm's `advantages`, and publish."""
    description = registry.describe(config.algorithm)
    coefficient = 0.0
    if "reference" in description.needs:
        coefficient = adapted_coefficient(config, config.previous) if config.previous else initial_coefficient(config)
    with context.timed("load"):
        advantages_of = registry.load(config.algorithm).advantages
        rollouts = Artifact.open(config.rollouts, ROLLOUTS)
        columns, ledger = collect(config, rollouts, description)
    with context.timed("compute"):
        experience = columns.experience(coefficient)
        found = advantages_of(experience, **config.settings)
        require_valid(found, experience, description)
        if not experience.penalised and (config.kl_target is not None or config.kl_coefficient is not None):
            raise UserError(
                f"algorithm {config.algorithm!r} puts no KL penalty into the reward, so kl_coefficient and kl_target "
                "would change nothing: leave them out. Its own settings may have a weight for the divergence."
            )
        kept = torch.ones(len(columns.keys), dtype=torch.bool) if found.keep is None else found.keep
        facts = summary(experience, found, kept, sum(columns.truncated))
    ledger.leave_out("not_kept", int((~kept).sum()))
    if not ledger.kept:
        raise UserError(
            f"algorithm {config.algorithm!r} keeps no sample of {config.rollouts} ({ledger}), so there is nothing to "
            "train on. Sample more answers, or use a scorer that tells them apart."
        )
    with context.timed("save"):
        rows = records(rollouts, columns, experience, found, kept)
        count = write_jsonl(context.publication.scratch(SHARD), rows)
        context.publication.commit(SHARD, ledger, rows=count)
    return Outcome("samples", facts, rollouts.manifest.weights)


def initial_coefficient(config: ExperienceConfig) -> float:
    """The KL coefficient of the first iteration."""
    return KL_COEFFICIENT if config.kl_coefficient is None else config.kl_coefficient


def adapted_coefficient(config: ExperienceConfig, previous: Path) -> float:
    """Adapt the coefficient to the previous iteration's KL divergence (Ziegler et al. 2019, section 2.2).

    coefficient · (1 + clip(KL / target - 1, -0.2, 0.2) · min(1, samples / horizon)). This is the paper's rule, with the
    iteration as the batch; the minimum limits the change to a fifth if an iteration has more samples than the horizon.

    Raises:
        UserError: the previous experience has no KL divergence.
    """
    assert config.kl_target is not None
    facts = Artifact.open(previous, EXPERIENCE).manifest.facts
    if facts.get("kl") is None or facts.get("kl_coefficient") is None:
        raise UserError(
            f"previous={previous} has no KL divergence and coefficient to continue from. Give the experience of an "
            "algorithm that puts a KL penalty into the reward, or leave previous out."
        )
    error = min(max(facts["kl"] / config.kl_target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
    return float(facts["kl_coefficient"] * (1 + error * min(1.0, facts["samples"] / config.kl_horizon)))


def require_valid(
    found: algorithm.Advantages, experience: algorithm.Experience, description: registry.Description
) -> None:
    """Raise UserError unless an algorithm's `advantages` returned finite tensors of the right shape."""
    what = f"algorithm {description.algorithm!r}: advantages"
    if not isinstance(found, algorithm.Advantages):
        raise UserError(f"{what} returned {type(found).__name__}; it must return training.algorithm.Advantages.")
    if (found.returns is None) != ("values" not in description.needs):
        has, contain = ("no `returns`", "contain") if found.returns is None else ("`returns`", "do not contain")
        raise UserError(
            f'{what} returned {has}, but NEEDS {contain} "values". Returns are the targets of a critic: give them if '
            'and only if NEEDS contain "values".'
        )
    tokens, samples = experience.behaviour.shape, experience.lengths.shape
    for name, shape in (("advantages", tokens), ("returns", tokens), ("keep", samples)):
        tensor = getattr(found, name)
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise UserError(f"{what} returned {name} of shape {tuple(tensor.shape)}; expected {tuple(shape)}.")
        if name == "keep":
            if tensor.dtype != torch.bool:
                raise UserError(f"{what} returned keep of {tensor.dtype}; it must be booleans, one for each response.")
        elif not bool(torch.isfinite(tensor).all()):
            position = int((~torch.isfinite(tensor)).nonzero()[0])
            number = int(experience.response_of_token[position])
            raise UserError(
                f"{what} returned {name} that are not finite, first {tensor[position].item()} for a token of response "
                f"{number}, whose reward is {experience.rewards[number].item():g}. Look for a division by zero, for "
                "example by the standard deviation of equal rewards."
            )


def records(
    rollouts: Artifact, columns: Columns, experience: algorithm.Experience, found: algorithm.Advantages, kept: Tensor
) -> Iterator[ExperienceRow]:
    """Yield the rows to publish, in the order of the rollouts, which are read again for their token ids."""
    per_token = {
        name: tensor
        for name, tensor in (
            ("behaviour", experience.behaviour),
            ("advantages", found.advantages),
            ("reference", experience.reference),
            ("values", experience.values),
            ("returns", found.returns),
        )
        if tensor is not None
    }
    ends = experience.lengths.cumsum(0).tolist()
    wanted = {
        key: (number, end)
        for number, (key, end, keep) in enumerate(zip(columns.keys, ends, kept.tolist(), strict=True))
        if keep
    }
    for rollout in rollouts.rows(Rollout):
        samples = []
        for completion in rollout.completions:
            if place := wanted.get((rollout.prompt_id, completion.sample)):
                number, end = place
                start = end - columns.lengths[number]
                numbers = {name: tuple(tensor[start:end].tolist()) for name, tensor in per_token.items()}
                samples.append(
                    ExperienceSample(
                        sample=completion.sample,
                        response_ids=completion.response_ids,
                        finish_reason=completion.finish_reason,
                        reward=columns.rewards[number],
                        **numbers,
                    )
                )
        if samples:
            yield ExperienceRow(
                rollout.prompt_id,
                rollout.prompt_ids,
                tuple(samples),
                rollout.policy,
                rollout.iteration,
                rollout.tags or msgspec.UNSET,
            )


def summary(experience: WatchedExperience, found: algorithm.Advantages, kept: Tensor, truncated: int) -> dict[str, Any]:
    """Facts for the manifest and the report: statistics over all usable samples, those of advantages over kept ones.

    `kl` is the mean over the responses of the sum over their tokens of behaviour - reference (nats), an unbiased
    estimate of the divergence of the sampling policy from the reference; None without a reference. `kl_coefficient` is
    None for algorithms that put no penalty into the reward. `zero_variance_prompts` counts the prompts with several
    responses that all have the same reward. `explained_variance` is 1 - Var(returns - values) / Var(returns): 1 for a
    critic that predicts all returns exactly, 0 for one that predicts their mean.
    """
    rewards, lengths, prompts = experience.rewards, experience.lengths.double(), experience.prompts
    groups = int(prompts[-1]) + 1
    lowest = torch.full((groups,), torch.inf, dtype=torch.float64).scatter_reduce(0, prompts, rewards, "amin")
    highest = torch.full((groups,), -torch.inf, dtype=torch.float64).scatter_reduce(0, prompts, rewards, "amax")
    equal = (lowest == highest) & (torch.bincount(prompts, minlength=groups) > 1)
    facts: dict[str, Any] = {
        "samples": len(rewards),
        "prompts": groups,
        "zero_variance_prompts": int(equal.sum()),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
        "response_length_mean": float(lengths.mean()),
        "response_length_max": int(lengths.max()),
        "truncation_rate": truncated / len(rewards),
        "kl": None,
        "kl_coefficient": experience.kl_coefficient if experience.penalised else None,
    }
    if experience.reference is not None:
        facts["kl"] = float((experience.behaviour - experience.reference).sum() / len(rewards))
    trained = kept[experience.response_of_token]
    if bool(trained.any()):
        advantages = found.advantages[trained]
        facts |= {
            "advantage_mean": float(advantages.mean()),
            "advantage_std": float(advantages.std(correction=0)),
            "advantage_min": float(advantages.min()),
            "advantage_max": float(advantages.max()),
        }
    if experience.values is not None and found.returns is not None:
        spread = float(found.returns.var(correction=0))
        left = float((found.returns - experience.values).var(correction=0))
        facts |= {
            "value_mean": float(experience.values.mean()),
            "return_mean": float(found.returns.mean()),
            "explained_variance": 1 - left / spread if spread else None,
        }
    return facts
