"""The experience stage: scored samples in, advantages and returns for every response token out.

All samples of an iteration are looked at together, in fp64 on the CPU, in flat arrays: what an algorithm normalises by
(the whole batch, or all answers to a prompt) is then the same however the training divides its work.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.joining import ScoresBySample, join
from contracts.jsonl import write_jsonl
from contracts.ledger import Ledger
from contracts.records import EXPERIENCE, ROLLOUTS, SCORES, Completion, Experience, ExperienceSample, Rollout, Score
from contracts.stage import Context, Outcome
from training import algorithm, registry
from training.config import ExperienceConfig

SHARD = "shard-00000.jsonl"
IMPORTED = "imported"
KL_COEFFICIENT = 0.05
"""By default; that of TRL's PPO."""
LARGEST_ERROR = 0.2
"""The relative distance of the KL divergence from its target that an adaptive coefficient answers to at most."""


def run(config: ExperienceConfig, context: Context) -> Outcome:
    """Join, prove that all numbers are of the same tokens, call the algorithm's `advantages`, publish."""
    description = registry.describe(config.algorithm)
    coefficient = 0.0
    if "reference" in description.needs:
        coefficient = first_coefficient(config) if config.previous is None else adapted(config, config.previous)
    with context.timed("load"):
        advantages_of = registry.load(config.algorithm).advantages
        rollouts = Artifact.open(config.rollouts, ROLLOUTS)
        columns, ledger = collect(config, rollouts, description)
    with context.timed("compute"):
        experience = columns.experience(coefficient)
        found = advantages_of(experience, **config.settings)
        require_sound(found, experience, description)
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


def first_coefficient(config: ExperienceConfig) -> float:
    """The coefficient where there is none to go on from."""
    return KL_COEFFICIENT if config.kl_coefficient is None else config.kl_coefficient


def adapted(config: ExperienceConfig, previous: Path) -> float:
    """The coefficient that follows from the KL divergence of the iteration before (Ziegler et al. 2019, section 2.2).

    coefficient · (1 + clip(KL / target - 1, -0.2, 0.2) · min(1, samples / horizon)). That is their rule for a batch of
    so many samples; the minimum keeps the change below a fifth where an iteration has more than their horizon.

    Raises:
        UserError: that experience knows no KL divergence.
    """
    assert config.kl_target is not None
    facts = Artifact.open(previous, EXPERIENCE).manifest.facts
    if facts.get("kl") is None or facts.get("kl_coefficient") is None:
        raise UserError(
            f"previous={previous} has no KL divergence and coefficient to go on from. Give the experience of an "
            "algorithm that puts a KL penalty into the reward, or leave previous out."
        )
    error = min(max(facts["kl"] / config.kl_target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return float(facts["kl_coefficient"] * (1 + error * min(1.0, facts["samples"] / config.kl_horizon)))


@dataclass
class Columns:
    """What is known of the samples that can be used, one after the other, in flat arrays."""

    keys: list[tuple[str, int]] = field(default_factory=list)
    """(prompt_id, sample) of each."""
    prompts: "array[int]" = field(default_factory=lambda: array("q"))
    """Number of the prompt that each answers, from 0 on."""
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    rewards: "array[float]" = field(default_factory=lambda: array("d"))
    tokens: "dict[str, array[float]]" = field(default_factory=dict)
    """behaviour, and those of reference, values and token_rewards that the algorithm needs: one number per response
    token."""
    greedy: "array[float] | None" = None
    truncated: list[bool] = field(default_factory=list)
    """Which were cut off by the token limit."""
    tags: list[tuple[str, ...]] = field(default_factory=list)
    """Of the prompt of each."""

    def experience(self, kl_coefficient: float) -> "WatchedExperience":
        """The same as tensors, which share the arrays' memory."""
        tokens = {name: _tensor(column) for name, column in self.tokens.items()}
        return WatchedExperience(
            rewards=_tensor(self.rewards),
            prompts=torch.frombuffer(self.prompts, dtype=torch.int64),
            lengths=torch.frombuffer(self.lengths, dtype=torch.int64),
            kl_coefficient=kl_coefficient,
            greedy=None if self.greedy is None else _tensor(self.greedy),
            truncated=torch.tensor(self.truncated),
            tags=self.tags,
            **tokens,
        )


class WatchedExperience(algorithm.Experience):
    """Knows whether an algorithm has looked at the coefficient."""

    penalised = False

    def __getattribute__(self, name: str) -> Any:
        """Like any other."""
        if name == "kl_coefficient":
            object.__setattr__(self, "penalised", True)
        return super().__getattribute__(name)


def _tensor(column: "array[float]") -> Tensor:
    return torch.frombuffer(column, dtype=torch.float64)


def collect(config: ExperienceConfig, rollouts: Artifact, description: registry.Description) -> tuple[Columns, Ledger]:
    """Read and join everything; what cannot be used is counted.

    Raises:
        UserError: what is given does not speak of the same tokens, or too few samples can be used.
    """
    sources = Sources(config, rollouts)
    rewarded = ["token_rewards"] if "token_rewards" in description.needs else []
    columns = Columns(tokens={name: array("d") for name in ("behaviour", *sources.per_token, *rewarded)})
    columns.greedy = None if sources.greedy is None else array("d")
    ledger = Ledger("samples")
    for rollout, found in join(rollouts, sources.scores):
        sources.require_different_samples(rollout)
        for completion in rollout.completions:
            if reason := sources.why_unusable(rollout, completion, found):
                ledger.drop(reason)
                continue
            ledger.keep()
            new = not columns.keys or columns.keys[-1][0] != rollout.prompt_id
            columns.prompts.append((columns.prompts[-1] if columns.prompts else -1) + new)
            columns.keys.append((rollout.prompt_id, completion.sample))
            columns.lengths.append(len(completion.response_ids))
            columns.rewards.append(sources.reward(found["rewards"][completion.sample]))
            columns.truncated.append(completion.finish_reason == "length")
            columns.tags.append(rollout.tags)
            for name, numbers in sources.tokens(rollout, completion, found):
                columns.tokens[name].extend(numbers)
            if rewarded:
                columns.tokens["token_rewards"].extend(sources.token_rewards(rollout, completion, found))
            if columns.greedy is not None:
                columns.greedy.append(sources.greedy_reward(rollout))
    if not ledger.kept:
        raise UserError(f"no sample of {config.rollouts} can be used: {ledger}. Score them, or generate again.")
    ledger.stop_above(config.max_dropped, f"samples of {config.rollouts}")
    return columns, ledger


class Sources:
    """What an experience is made of; every method raises a UserError where it does not fit together."""

    def __init__(self, config: ExperienceConfig, rollouts: Artifact) -> None:
        paths = {"rewards": config.rewards, "reference": config.reference, "values": config.values}
        self.rollouts = rollouts
        self.scores = {name: Artifact.open(path, SCORES) for name, path in paths.items() if path is not None}
        self.per_token = [name for name in ("reference", "values") if name in self.scores]
        for name in self.per_token:
            self._require_same_vocabulary(name)
        self.greedy: dict[str, tuple[tuple[int, ...], float]] | None = None
        """prompt_ids and reward of each prompt's greedy answer."""
        if config.greedy is not None and config.greedy_rollouts is not None:
            sampled = Artifact.open(config.greedy_rollouts, ROLLOUTS)
            self.greedy = dict(self._read_greedy(sampled, Artifact.open(config.greedy, SCORES)))

    def why_unusable(self, rollout: Rollout, completion: Completion, found: dict[str, ScoresBySample]) -> str | None:
        """The reason for which a sample is dropped, if any: nobody has scored it, or it has no token."""
        if not completion.response_ids:
            return "empty"
        missing = next((name for name in self.scores if completion.sample not in found[name]), None)
        if missing is None and self.greedy is not None and rollout.prompt_id not in self.greedy:
            missing = "greedy"
        return f"no_{missing}" if missing else None

    def reward(self, score: Score) -> float:
        """The reward of a sample."""
        if score.token_logprobs is not None or score.token_values is not None:
            raise UserError(
                f"rewards={self.scores['rewards'].path} holds log-probabilities or values, not rewards. Give the "
                "scores of a reward model or a rule."
            )
        return score.score

    def tokens(
        self, rollout: Rollout, completion: Completion, found: dict[str, ScoresBySample]
    ) -> Iterator[tuple[str, tuple[float, ...]]]:
        """The columns that have one number for each of a sample's response tokens."""
        where = f"prompt {rollout.prompt_id}, sample {completion.sample}"
        yield "behaviour", self._behaviour(rollout, completion, where)
        for name in self.per_token:
            path, score = self.scores[name].path, found[name][completion.sample]
            numbers = score.token_logprobs if name == "reference" else score.token_values
            if numbers is None:
                kind = "logprobs" if name == "reference" else "values"
                raise UserError(f"{name}={path} has no number per token. Give scores of the kind {kind}.")
            _require_one_each(numbers, completion, f"{name}={path}: {where}")
            yield name, numbers

    def token_rewards(
        self, rollout: Rollout, completion: Completion, found: dict[str, ScoresBySample]
    ) -> tuple[float, ...]:
        """The reward of each of a sample's tokens."""
        numbers = found["rewards"][completion.sample].token_rewards
        path, where = self.scores["rewards"].path, f"prompt {rollout.prompt_id}, sample {completion.sample}"
        if not numbers:
            raise UserError(
                f"rewards={path}: {where} has no reward per token, which the algorithm needs. Use a scorer that gives "
                "them: a rule that returns a list of numbers, one for each of response_ids."
            )
        _require_one_each(numbers, completion, f"rewards={path}: {where}")
        return numbers

    def greedy_reward(self, rollout: Rollout) -> float:
        """The reward of the greedy answer to a rollout's prompt."""
        assert self.greedy is not None
        prompt_ids, reward = self.greedy[rollout.prompt_id]
        if prompt_ids != rollout.prompt_ids:
            raise UserError(
                f"greedy_rollouts has other token ids for prompt {rollout.prompt_id} than {self.rollouts.path}. "
                "Generate both with the same policy."
            )
        return reward

    def require_different_samples(self, rollout: Rollout) -> None:
        """Each sample of a prompt has a number of its own."""
        numbers = [completion.sample for completion in rollout.completions]
        if len(set(numbers)) < len(numbers):
            raise UserError(
                f"{self.rollouts.path}: prompt {rollout.prompt_id} has two samples of the same number ({numbers}), so "
                "their scores cannot be told apart. Generate again."
            )

    def _behaviour(self, rollout: Rollout, completion: Completion, where: str) -> tuple[float, ...]:
        """Log-probabilities under the policy's own distribution, which must be what was sampled from."""
        where, sampling = f"{self.rollouts.path}: {where}", completion.sampling
        if rollout.policy == IMPORTED or sampling is None or not completion.logprobs:
            raise UserError(
                f"{where} has no log-probabilities of the policy that sampled it, as imported answers have none. "
                "Generate the answers with this run's policy; for imported ones use an algorithm that reads pairs."
            )
        if (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, 0):
            raise UserError(
                f"{where} was sampled with temperature={sampling.temperature:g}, top_p={sampling.top_p:g}, "
                f"top_k={sampling.top_k}, so not from the policy's own distribution, which is what is trained. "
                "Generate with temperatures=[1.0], top_p=1 and top_k=0."
            )
        _require_one_each(completion.logprobs, completion, f"{where}: logprobs")
        return completion.logprobs

    def _require_same_vocabulary(self, name: str) -> None:
        wanted = self.rollouts.manifest.facts.get("vocabulary")
        found = self.scores[name].manifest.facts.get("vocabulary")
        if wanted is None or found != wanted:
            raise UserError(
                f"{name}={self.scores[name].path} does not say that its model has the vocabulary of the policy that "
                f"sampled {self.rollouts.path} ({found} and {wanted}), so nobody can tell whether both mean the same "
                "tokens. Generate and score again, with a model that has the policy's tokenizer."
            )

    def _read_greedy(self, sampled: Artifact, scores: Artifact) -> Iterator[tuple[str, tuple[tuple[int, ...], float]]]:
        """Each prompt's greedy answer, after a proof that it is one, of the same policy and by the same judge."""
        if _judge_of(scores) != _judge_of(self.scores["rewards"]):
            raise UserError(
                f"greedy={scores.path} and rewards={self.scores['rewards'].path} are not by the same scorer, so they "
                "cannot be compared. Score both with the same settings."
            )
        if sampled.manifest.weights != self.rollouts.manifest.weights:
            raise UserError(
                f"greedy_rollouts={sampled.path} is of another policy than {self.rollouts.path}. Generate both with "
                "the same policy."
            )
        for rollout, found in join(sampled, {"greedy": scores}):
            first = rollout.completions[0]
            if len(rollout.completions) > 1 or first.sampling is None or first.sampling.temperature != 0:
                raise UserError(
                    f"greedy_rollouts={sampled.path}: prompt {rollout.prompt_id} has not one greedy answer. Generate "
                    "with k=1 and temperatures=[0]."
                )
            if first.sample in found["greedy"]:
                yield rollout.prompt_id, (rollout.prompt_ids, found["greedy"][first.sample].score)


def _require_one_each(numbers: tuple[float, ...], completion: Completion, what: str) -> None:
    if len(numbers) != len(completion.response_ids):
        raise UserError(
            f"{what} has {len(numbers)} numbers for {len(completion.response_ids)} response tokens; there must be one "
            "for each. Make them again from these rollouts."
        )


def _judge_of(scores: Artifact) -> Any:
    """What decides the scores of a sample: the settings, the model, the function's source."""
    parts = scores.manifest.key_parts
    inputs = {name: value for name, value in scores.manifest.inputs.items() if name != "rollouts"}
    return parts.get("config"), parts.get("sources"), inputs


def require_sound(
    found: algorithm.Advantages, experience: algorithm.Experience, description: registry.Description
) -> None:
    """Raise UserError unless an algorithm has returned finite numbers of the right shape."""
    what = f"algorithm {description.algorithm!r}: advantages"
    if not isinstance(found, algorithm.Advantages):
        raise UserError(f"{what} returned {type(found).__name__}; it must return training.algorithm.Advantages.")
    if (found.returns is None) != ("values" not in description.needs):
        has, wants = ("no", "a critic") if found.returns is None else ("some", "no critic")
        raise UserError(
            f"{what} gave {has} returns, but its NEEDS say that it has {wants}. Returns are what a critic learns: give "
            'them exactly where NEEDS holds "values".'
        )
    tokens, samples = experience.behaviour.shape, experience.lengths.shape
    for name, shape in (("advantages", tokens), ("returns", tokens), ("keep", samples)):
        tensor = getattr(found, name)
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise UserError(f"{what} gave {name} of shape {tuple(tensor.shape)}; expected {tuple(shape)}.")
        if name == "keep":
            if tensor.dtype != torch.bool:
                raise UserError(f"{what} gave keep of {tensor.dtype}; it must be booleans, one for each response.")
        elif not bool(torch.isfinite(tensor).all()):
            position = int((~torch.isfinite(tensor)).nonzero()[0])
            number = int(experience.response_of_token[position])
            raise UserError(
                f"{what} gave {name} that are not finite, first {tensor[position].item()} for a token of response "
                f"{number}, whose reward is {experience.rewards[number].item():g}. Look for a division by zero, as by "
                "the standard deviation of equal rewards."
            )


def records(
    rollouts: Artifact, columns: Columns, experience: algorithm.Experience, found: algorithm.Advantages, kept: Tensor
) -> Iterator[Experience]:
    """The rows, in the order of the rollouts, which are read once more for their tokens."""
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
            yield Experience(
                rollout.prompt_id,
                rollout.prompt_ids,
                tuple(samples),
                rollout.policy,
                rollout.iteration,
                rollout.tags or msgspec.UNSET,
            )


def summary(experience: WatchedExperience, found: algorithm.Advantages, kept: Tensor, truncated: int) -> dict[str, Any]:
    """What the report says of an experience: of all usable samples, but of the advantages only where they are kept.

    `kl` is the mean over the responses of the sum over their tokens of behaviour - reference (nats), an unbiased
    estimate of the divergence of the sampling policy from the reference; None without a reference. `kl_coefficient` is
    None for algorithms that put no penalty into the reward. `zero_variance_prompts` counts those with several responses
    and the same reward for all of them.
    `explained_variance` is 1 - Var(returns - values) / Var(returns): 1 for a critic that foresees everything, 0 for one
    that knows the mean.
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
