"""Joins rollouts and scores into flat arrays for the experience stage, and verifies that they belong together."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.joining import ScoresBySample, join
from contracts.ledger import Ledger
from contracts.records import ROLLOUTS, SCORES, Completion, Rollout, Score
from training import algorithm, registry
from training.config import ExperienceConfig

IMPORTED = "imported"


@dataclass
class Columns:
    """The usable samples, concatenated in flat arrays."""

    keys: list[tuple[str, int]] = field(default_factory=list)
    """(prompt_id, sample) of each sample."""
    prompts: "array[int]" = field(default_factory=lambda: array("q"))
    """Index of each sample's prompt, from 0."""
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    rewards: "array[float]" = field(default_factory=lambda: array("d"))
    tokens: "dict[str, array[float]]" = field(default_factory=dict)
    """Columns with one number per response token: behaviour; reference, values and token_rewards if needed."""
    greedy: "array[float] | None" = None
    truncated: list[bool] = field(default_factory=list)
    """Whether each sample was cut off by the token limit."""
    tags: list[tuple[str, ...]] = field(default_factory=list)
    """Tags of each sample's prompt."""

    def experience(self, kl_coefficient: float) -> "WatchedExperience":
        """The samples as tensors that share the arrays' memory."""
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
    """An experience that records in `penalised` whether the algorithm reads `kl_coefficient`."""

    penalised = False

    def __getattribute__(self, name: str) -> Any:
        """Intercept reads of `kl_coefficient`."""
        if name == "kl_coefficient":
            object.__setattr__(self, "penalised", True)
        return super().__getattribute__(name)


def _tensor(column: "array[float]") -> Tensor:
    return torch.frombuffer(column, dtype=torch.float64)


def collect(config: ExperienceConfig, rollouts: Artifact, description: registry.Description) -> tuple[Columns, Ledger]:
    """Read and join everything; unusable samples are dropped and counted.

    Raises:
        UserError: the inputs are not of the same samples and tokens, or too many samples are unusable.
    """
    sources = Sources(config, rollouts)
    rewarded = ["token_rewards"] if "token_rewards" in description.needs else []
    columns = Columns(tokens={name: array("d") for name in ("behaviour", *sources.per_token, *rewarded)})
    columns.greedy = None if sources.greedy is None else array("d")
    ledger = Ledger("samples")
    for rollout, found in join(rollouts, sources.scores):
        sources.require_distinct_samples(rollout)
        for completion in rollout.completions:
            if reason := sources.drop_reason(rollout, completion, found):
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
    """The artifacts to join; every method raises a UserError if they do not belong together."""

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

    def drop_reason(self, rollout: Rollout, completion: Completion, found: dict[str, ScoresBySample]) -> str | None:
        """The ledger's reason to drop a sample, which has no tokens or lacks a score; None to keep it."""
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
        """Yield a sample's columns with one number per response token, by name."""
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
                "them: a process reward model, or a rule that returns a list of numbers, one for each of response_ids."
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

    def require_distinct_samples(self, rollout: Rollout) -> None:
        """Check that the samples of a prompt have distinct indices."""
        numbers = [completion.sample for completion in rollout.completions]
        if len(set(numbers)) < len(numbers):
            raise UserError(
                f"{self.rollouts.path}: prompt {rollout.prompt_id} has two samples with the same index ({numbers}), so "
                "their scores cannot be told apart. Generate again."
            )

    def _behaviour(self, rollout: Rollout, completion: Completion, where: str) -> tuple[float, ...]:
        """The sampling policy's log-probabilities; the sample must be from its own, unmodified distribution."""
        where, sampling = f"{self.rollouts.path}: {where}", completion.sampling
        if rollout.policy == IMPORTED or sampling is None or not completion.logprobs:
            raise UserError(
                f"{where} has no log-probabilities of the policy that sampled it, as imported answers have none. "
                "Generate the answers with this run's policy; for imported ones use an algorithm that reads pairs."
            )
        if changed := sampling.departures():
            raise UserError(
                f"{where} was sampled with {changed}, so not from the policy's own distribution, which is what is "
                "trained. Generate with temperatures=[1.0], and without what changes the distribution (top_p, top_k, "
                "min_p, min_new_tokens, penalties, guided, thinking)."
            )
        _require_one_each(completion.logprobs, completion, f"{where}: logprobs")
        return completion.logprobs

    def _require_same_vocabulary(self, name: str) -> None:
        wanted = self.rollouts.manifest.facts.get("vocabulary")
        found = self.scores[name].manifest.facts.get("vocabulary")
        if wanted is None or found != wanted:
            raise UserError(
                f"{name}={self.scores[name].path} does not say that its model has the vocabulary of the policy that "
                f"sampled {self.rollouts.path} ({found} and {wanted}), so their token ids may not match. Generate and "
                "score again, with a model that has the policy's tokenizer."
            )

    def _read_greedy(self, sampled: Artifact, scores: Artifact) -> Iterator[tuple[str, tuple[tuple[int, ...], float]]]:
        """Yield each prompt's greedy answer, after checking that it is greedy and has the same policy and scorer."""
        if _scorer_of(scores) != _scorer_of(self.scores["rewards"]):
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
                    f"greedy_rollouts={sampled.path}: prompt {rollout.prompt_id} does not have exactly one greedy "
                    "answer. Generate with k=1 and temperatures=[0]."
                )
            if first.sample in found["greedy"]:
                yield rollout.prompt_id, (rollout.prompt_ids, found["greedy"][first.sample].score)


def _require_one_each(numbers: tuple[float, ...], completion: Completion, what: str) -> None:
    if len(numbers) != len(completion.response_ids):
        raise UserError(
            f"{what} has {len(numbers)} numbers for {len(completion.response_ids)} response tokens; there must be one "
            "for each. Make them again from these rollouts."
        )


def _scorer_of(scores: Artifact) -> Any:
    """Everything that determines the scores: settings, model, the function's source."""
    parts = scores.manifest.key_parts
    inputs = {name: value for name, value in scores.manifest.inputs.items() if name != "rollouts"}
    return parts.get("config"), parts.get("sources"), inputs
