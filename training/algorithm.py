"""Defines the interface of algorithms: a Python file with a loss, and the batch types that the loss is called with.

An algorithm that learns from preference pairs:

    READS = "pairs"
    NEEDS = ("reference",)
    LIMITS = {"beta": "> 0"}

    def loss(batch: Pairs, *, beta: float = 0.1) -> Metrics: ...

One that learns from scored samples (`training/experience.py` calls `advantages` once per iteration, on all of them):

    READS = "samples"
    NEEDS = ("reference", "values")
    LIMITS = {"gamma": ">= 0, <= 1", "clip": "> 0"}

    def advantages(experience: Experience, *, gamma: float = 1.0) -> Advantages: ...
    def loss(batch: Samples, *, clip: float = 0.2) -> Metrics: ...

The keyword arguments are the algorithm's settings; LIMITS restricts their values. The constants and the settings are
read without running the file, so they must be literals. NEEDS may contain:

    reference        pairs, samples   log-probabilities of the responses under the reference policy
    reference_model  pairs, samples   the reference policy itself: divergences between full distributions
    tokens           pairs            log-probabilities per token, instead of sums per answer only
    entropy          pairs            entropy of the policy's distribution at each token; samples always have it
    collision        pairs            see `Answers.log_collision`
    values           samples          values of a critic, which is trained alongside the policy
    greedy           samples          rewards of the greedy answers to the same prompts (a baseline)
    token_rewards    samples          the scorer's reward for each token

A loss returns a dict of metrics, `loss` among them. Each is this micro-batch's share of a mean over the whole optimizer
step (`batch.mean` and the like), so that the shares of all micro-batches and data parallel ranks add up to the step's
metric, however gradient accumulation and parallelism divide the step. A loss that depends on step-wide quantities (a
batch mean inside a nonlinearity, other pairs) defines `statistics(batch, **settings)` of the same form, which runs over
the whole step without gradients first; its summed metrics are in `batch.statistics`. They may be vectors from
`batch.gather`: one number for every pair or response of the step.

Decisions made once per step, and state carried from step to step, belong in `update(step, **settings)`, which runs
between `statistics` and the loss: every process calls it with the same `Step`, and its result is added to
`batch.statistics`. It must return every name in STATE, which also gives the initial values; the next step has them in
`step.state`:

    STATE = {"mean": 0.0}

    def update(step: Step, *, momentum: float = 0.9) -> dict[str, float | Tensor]:
        return {"mean": momentum * step.state["mean"] + (1 - momentum) * step.statistics["margin"]}
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from contracts.errors import UserError

Metrics = dict[str, Tensor]
Statistics = dict[str, float | Tensor]
"""Step-wide scalars, and vectors with one number for each of the step's pairs or responses."""


def missing_need(need: str) -> UserError:
    """The error for an algorithm that uses an input that its NEEDS do not list."""
    return UserError(f'the algorithm uses what its NEEDS do not ask for. Add "{need}" to NEEDS in its file.')


def owners(lengths: Tensor, tokens: int) -> Tensor:
    """Index of the response that each of `tokens` tokens belongs to, [N]; `lengths` are tokens per response, [S]."""
    numbers = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(numbers, lengths, output_size=tokens)  # output_size avoids a GPU sync


def sum_by_response(values: Tensor, lengths: Tensor) -> Tensor:
    """The sum over each response's tokens, [N] -> [S]."""
    return values.new_zeros(len(lengths)).index_add(0, owners(lengths, len(values)), values)


def uniform(seeds: Sequence[int], lengths: Tensor) -> Tensor:
    """Uniform random numbers in [0, 1), one per token, [N] in fp64; one seed per response, `lengths` tokens each."""
    made = (
        torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed, length in zip(seeds, lengths.tolist(), strict=True)
    )
    return torch.cat([*made, torch.empty(0, dtype=torch.float64)]).to(lengths.device)


@dataclass(frozen=True)
class Answers:
    """The chosen, or the rejected, answers of P pairs with N tokens in all. Tensors are [P], or [N] (concatenated)."""

    logp: Tensor
    """Summed log-probability of the response tokens under the policy (nats), with gradient."""
    length: Tensor
    """Number of response tokens, as floats."""
    score: Tensor
    """The scorer's score, by which the pair was chosen."""
    reference_logp: Tensor | None = None
    """Summed log-probability under the reference policy, if the algorithm needs it."""
    log_collision: Tensor | None = None
    """Sum over the response tokens of log sum_v p(v)^2 under the policy, without gradient, if it is needed."""
    truncated: Tensor | None = None
    """Whether the answer was cut off by the token limit (`finish_reason` is "length"). [P], booleans"""
    logprobs: Tensor | None = None
    """Log-probability of each token under the policy, with gradient; with "tokens". [N]"""
    reference: Tensor | None = None
    """Log-probability of each token under the reference policy; with "tokens". [N]"""
    entropy: Tensor | None = None
    """Entropy of the policy's distribution at each token (nats), with gradient; with "entropy". [N]"""
    kl_to_reference: Tensor | None = None
    """KL(pi || pi_ref) between the full distributions at each token, with gradient; with "reference_model". [N]"""
    kl_from_reference: Tensor | None = None
    """KL(pi_ref || pi), likewise. [N]"""
    seeds: Sequence[int] = ()
    """Each answer's random seed for this step."""

    @property
    def answer_of_token(self) -> Tensor:
        """Index of the answer that each token belongs to, [N]."""
        lengths = self.length.long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    @property
    def position(self) -> Tensor:
        """Position of each token within its answer, from 0, [N]."""
        lengths, answers = self.length.long(), self.answer_of_token
        return torch.arange(len(answers), device=lengths.device) - (lengths.cumsum(0) - lengths)[answers]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over each answer's tokens, [N] -> [P]; 0 for an empty answer."""
        return sum_by_response(values, self.length.long())

    def random(self) -> Tensor:
        """A random number in [0, 1) for each token, [N] in fp64; different in each step, the same in any layout."""
        return uniform(self.seeds, self.length.long())

    @property
    def log_ratio(self) -> Tensor:
        """log pi(y|x) - log pi_ref(y|x)."""
        if self.reference_logp is None:
            raise missing_need("reference")
        return self.logp - self.reference_logp

    @property
    def mean_logp(self) -> Tensor:
        """log pi(y|x) / |y|; 0 for an empty answer."""
        return self.logp / self.length.clamp(min=1)


@dataclass(frozen=True)
class Pairs:
    """A micro-batch of P preference pairs."""

    chosen: Answers
    rejected: Answers
    weights: Tensor
    """1, or 0 for a filler, [P]."""
    total: int
    """Number of pairs in the optimizer step."""
    chosen_tokens: int
    """Number of tokens in all chosen answers of the optimizer step."""
    statistics: Statistics = field(default_factory=dict)
    """Step-wide values from the algorithm's `statistics` and `update`."""
    step: int = 0
    """Optimizer step, counted from 0."""
    steps: int = 1
    """Number of optimizer steps in the training."""
    places: Tensor | None = None
    """Index of each pair within the step; None if the micro-batch is the whole step. [P], integers"""
    tags: Sequence[tuple[str, ...]] = ()
    """Tags of each pair's prompt."""

    def mean(self, values: Tensor) -> Tensor:
        """The share of this micro-batch in the step's mean of one value per pair, [P] -> []."""
        return (self.weights * values).sum() / self.total

    def gather(self, values: Tensor) -> Tensor:
        """The share of this micro-batch in a vector with one value for each pair of the step, [P] -> [total]."""
        return _gather(self.weights * values, self.places, self.total)

    def own(self, values: Tensor) -> Tensor:
        """Select this micro-batch's values from a vector with one value per pair of the step, [total] -> [P]."""
        return values if self.places is None else values.to(self.places.device)[self.places]

    def tagged(self, tag: str) -> Tensor:
        """Whether each pair's prompt has a tag, [P], booleans."""
        return _tagged(self.tags, tag, self.weights.device)

    def chosen_nll(self) -> Tensor:
        """The share of this micro-batch in the mean of -log pi over all chosen response tokens of the step, []."""
        return -(self.weights * self.chosen.logp).sum() / max(self.chosen_tokens, 1)

    def rewards(self, chosen: Tensor, rejected: Tensor) -> Metrics:
        """The usual metrics of preference losses (TRL's rewards/*), from the implicit rewards, [P] each."""
        chosen, rejected = chosen.detach(), rejected.detach()
        return {
            "accuracy": self.mean((chosen > rejected).float()),
            "chosen_reward": self.mean(chosen),
            "rejected_reward": self.mean(rejected),
            "margin": self.mean(chosen - rejected),
        }


@dataclass(frozen=True)
class Samples:
    """A micro-batch of S responses with N tokens in all; tensors of shape [N] concatenate the responses' tokens."""

    logprobs: Tensor
    """Log-probability of each token under the policy (nats), with gradient. [N]"""
    entropy: Tensor
    """Entropy of the policy's distribution at each token (nats), with gradient. [N]"""
    proximal: Tensor
    """Log-probabilities under the policy at the start of this training, computed by the trainer. [N]"""
    behaviour: Tensor
    """Log-probabilities under the policy that sampled, as the generation engine reported them. [N]"""
    advantages: Tensor
    """Results of the algorithm's `advantages`, times the weights of the importance correction, if any. [N]"""
    lengths: Tensor
    """Tokens of each response, at least 1. [S], integers"""
    weights: Tensor
    """1, or 0 for a filler. [S]"""
    total: int
    """Number of responses in the optimizer step."""
    total_tokens: int
    """Number of response tokens in the optimizer step."""
    reference: Tensor | None = None
    """Log-probabilities under the reference policy, if the algorithm needs them. [N]"""
    values: Tensor | None = None
    """The value head's predictions, with gradient, if policy and critic share a backbone. [N]"""
    old_values: Tensor | None = None
    """The critic's predictions before this training. [N]"""
    returns: Tensor | None = None
    """The critic's targets, as returned by the algorithm's `advantages`. [N]"""
    statistics: Statistics = field(default_factory=dict)
    """Step-wide values from the algorithm's `statistics` and `update`."""
    rewards: Tensor | None = None
    """The scorer's reward of each response. [S]"""
    prompts: Tensor | None = None
    """Index of each response's prompt within this micro-batch, which has all responses to a prompt or none.
    [S], integers in ascending order"""
    total_prompts: int = 1
    """Number of prompts in the optimizer step."""
    truncated: Tensor | None = None
    """Whether the response was cut off by the token limit (`finish_reason` is "length"). [S], booleans"""
    kl_to_reference: Tensor | None = None
    """KL(pi || pi_ref) between the full distributions at each token, with gradient; with "reference_model". [N]"""
    kl_from_reference: Tensor | None = None
    """KL(pi_ref || pi), likewise. [N]"""
    step: int = 0
    """Optimizer step, counted from 0."""
    steps: int = 1
    """Number of optimizer steps in the training."""
    places: Tensor | None = None
    """Index of each response within the step; None if the micro-batch is the whole step. [S], integers"""
    tags: Sequence[tuple[str, ...]] = ()
    """Tags of each response's prompt."""
    seeds: Sequence[int] = ()
    """Each response's random seed for this step."""

    def sum_by_response(self, values: Tensor) -> Tensor:
        """The sum over each response's tokens, [N] -> [S]."""
        return sum_by_response(values, self.lengths)

    @property
    def response_of_token(self) -> Tensor:
        """Index of the response that each token belongs to, [N]."""
        return owners(self.lengths, len(self.logprobs))

    def mean(self, values: Tensor) -> Tensor:
        """The share of this micro-batch in the step's mean of one value per response, [S] -> []."""
        return (self.weights * values).sum() / self.total

    def token_mean(self, values: Tensor) -> Tensor:
        """The share of this micro-batch in the step's mean of one value per response token, [N] -> []."""
        return (self.weights[self.response_of_token] * values).sum() / self.total_tokens

    def prompt_mean(self, values: Tensor) -> Tensor:
        """The share of this micro-batch in the step's mean of one value per prompt, [prompts] -> []."""
        assert self.prompts is not None
        weights = self.weights.new_zeros(len(values)).scatter(0, self.prompts, self.weights)
        return (weights * values).sum() / self.total_prompts

    def gather(self, values: Tensor) -> Tensor:
        """The share of this micro-batch in a vector with one value for each response of the step, [S] -> [total]."""
        return _gather(self.weights * values, self.places, self.total)

    def own(self, values: Tensor) -> Tensor:
        """Select this micro-batch's values from a vector with one value per response of the step, [total] -> [S]."""
        return values if self.places is None else values.to(self.places.device)[self.places]

    def tagged(self, tag: str) -> Tensor:
        """Whether each response's prompt has a tag, [S], booleans."""
        return _tagged(self.tags, tag, self.weights.device)

    def random(self) -> Tensor:
        """A random number in [0, 1) for each token, [N] in fp64; different in each step, the same in any layout."""
        return uniform(self.seeds, self.lengths)


def _gather(values: Tensor, places: Tensor | None, total: int) -> Tensor:
    return values if places is None else values.new_zeros(total).index_add(0, places, values)


def _tagged(tags: Sequence[tuple[str, ...]], tag: str, device: torch.device) -> Tensor:
    return torch.tensor([tag in own for own in tags], dtype=torch.bool, device=device)


@dataclass(frozen=True)
class Step:
    """The argument of `update`, which runs once per optimizer step: step-wide values, equal in every process."""

    step: int
    """Optimizer step, counted from 0."""
    steps: int
    """Number of optimizer steps in the training."""
    statistics: Statistics
    """The summed metrics of `statistics`; vectors are in fp64 on the CPU."""
    state: dict[str, float]
    """The previous step's results of `update` for the names in STATE; in the first step their initial values."""
    generator: torch.Generator
    """Random generator, seeded the same in every process and differently in each step."""


@dataclass(frozen=True)
class Experience:
    """All scored samples of an iteration: S responses with N tokens in all, in fp64 on the CPU."""

    rewards: Tensor
    """The scorer's reward of each response. [S]"""
    prompts: Tensor
    """Index of each response's prompt, from 0, in ascending order. [S], integers"""
    lengths: Tensor
    """Tokens of each response, at least 1. [S], integers"""
    behaviour: Tensor
    """Log-probabilities under the policy that sampled (nats). [N]"""
    kl_coefficient: float
    """Weight of the penalty on the KL divergence from the reference, for this iteration."""
    reference: Tensor | None = None
    """Log-probabilities under the reference policy, if the algorithm needs them. [N]"""
    values: Tensor | None = None
    """The critic's value of the state in which each token was chosen, if the algorithm needs them. [N]"""
    greedy: Tensor | None = None
    """Reward of the greedy answer to each response's prompt, if the algorithm needs it. [S]"""
    token_rewards: Tensor | None = None
    """The scorer's reward for each token, if the algorithm needs it. [N]"""
    truncated: Tensor | None = None
    """Whether the response was cut off by the token limit (`finish_reason` is "length"). [S], booleans"""
    tags: Sequence[tuple[str, ...]] = ()
    """Tags of each response's prompt."""

    def tagged(self, tag: str) -> Tensor:
        """Whether each response's prompt has a tag, [S], booleans."""
        return _tagged(self.tags, tag, self.rewards.device)

    @property
    def response_of_token(self) -> Tensor:
        """Index of the response that each token belongs to, [N]."""
        return owners(self.lengths, len(self.behaviour))


@dataclass(frozen=True)
class Advantages:
    """The result of an algorithm's `advantages`."""

    advantages: Tensor
    """Advantage of each token. [N]"""
    returns: Tensor | None = None
    """The critic's targets, for algorithms that need a critic. [N]"""
    keep: Tensor | None = None
    """Mask of the responses to train on; the others are dropped and counted. None: all of them. [S], booleans"""
