"""What an algorithm is: a Python file with a loss, and what that loss sees of an optimizer step.

An algorithm that learns from preference pairs:

    READS = "pairs"
    NEEDS = ("reference",)
    LIMITS = {"beta": "> 0"}

    def loss(batch: Pairs, *, beta: float = 0.1) -> Figures: ...

One that learns from scored samples (`training/experience.py` calls `advantages` once per iteration, on all of them):

    READS = "samples"
    NEEDS = ("reference", "values")
    LIMITS = {"gamma": ">= 0, <= 1", "clip": "> 0"}

    def advantages(experience: Experience, *, gamma: float = 1.0) -> Advantages: ...
    def loss(batch: Samples, *, clip: float = 0.2) -> Figures: ...

The keyword arguments are the algorithm's settings, LIMITS says which of their numbers make sense. All that is in
capitals, and the settings, are read without running the file, so they must be written out. What NEEDS may hold:

    reference        pairs, samples   log-probabilities of the responses under the reference policy
    reference_model  pairs, samples   the reference policy itself, beside the policy: divergences of whole distributions
    tokens           pairs            every token's log-probabilities, where pairs have only sums
    entropy          pairs            of the policy's distribution at each token; samples always have it
    collision        pairs            see `Answers.log_collision`
    values           samples          of a critic, which is trained beside the policy
    greedy           samples          rewards of greedy answers to the same prompts
    token_rewards    samples          the scorer's reward for each token

A loss returns figures, `loss` among them; each is this micro-batch's share of a mean over the whole optimizer step,
which `batch.mean` and the like compute. So the shares of all micro-batches and processes add up to the step's figure,
however the step was divided. What needs the whole step first (a batch mean inside of a nonlinearity, other pairs) comes
from a function `statistics(batch, **settings)` of the same form, which runs over the step without gradients; the loss
finds its figures, added up, in `batch.statistics`. There may be vectors among them, which `batch.gather` makes: one
number for every pair or response of the step.

What is decided once per step, or kept from step to step, comes from a function `update(step, **settings)` between the
two: every process calls it with the same `Step`, and the loss finds what it returns in `batch.statistics` as well. The
names in STATE, with their first values, it must return each time; it finds them again in the next step's `step.state`:

    STATE = {"mean": 0.0}

    def update(step: Step, *, momentum: float = 0.9) -> dict[str, float | Tensor]:
        return {"mean": momentum * step.state["mean"] + (1 - momentum) * step.statistics["margin"]}
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from contracts.errors import UserError

Figures = dict[str, Tensor]
Statistics = dict[str, float | Tensor]
"""Numbers of a whole optimizer step, and vectors with one number for each of its pairs or responses."""


def lacking(need: str) -> UserError:
    """What to raise where an algorithm's file uses what it has not asked for."""
    return UserError(f'the algorithm uses what its NEEDS do not ask for. Add "{need}" to NEEDS in its file.')


def owners(lengths: Tensor, tokens: int) -> Tensor:
    """Index of the response that each of `tokens` tokens belongs to, [N]; the responses are `lengths` long, [S]."""
    numbers = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(numbers, lengths, output_size=tokens)  # without its size a GPU waits


def sum_by_response(values: Tensor, lengths: Tensor) -> Tensor:
    """The sum over each response's tokens, [N] -> [S]."""
    return values.new_zeros(len(lengths)).index_add(0, owners(lengths, len(values)), values)


def uniform(seeds: Sequence[int], lengths: Tensor) -> Tensor:
    """Random numbers in [0, 1), one for each token of responses that are `lengths` long, [N] in fp64."""
    made = (
        torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed, length in zip(seeds, lengths.tolist(), strict=True)
    )
    return torch.cat([*made, torch.empty(0, dtype=torch.float64)]).to(lengths.device)


@dataclass(frozen=True)
class Answers:
    """One answer of each of P pairs, N tokens in all. Tensors have shape [P], or [N]: one answer after the other."""

    logp: Tensor
    """Summed log-probability of the response tokens under the policy (nats), with gradient."""
    length: Tensor
    """Response tokens, as floats."""
    score: Tensor
    """Score that the pair was chosen by."""
    reference_logp: Tensor | None = None
    """Summed log-probability under the reference policy, if the algorithm needs it."""
    log_collision: Tensor | None = None
    """Sum over the response tokens of log sum_v p(v)^2 under the policy, without gradient, if it is needed."""
    truncated: Tensor | None = None
    """Whether the answer was cut off by the token limit (`finish_reason` is "length"). [P], booleans"""
    logprobs: Tensor | None = None
    """Of each token under the policy, with gradient; with "tokens". [N]"""
    reference: Tensor | None = None
    """Of each token under the reference policy; with "tokens". [N]"""
    entropy: Tensor | None = None
    """Of the policy's distribution at each token (nats), with gradient; with "entropy". [N]"""
    kl_to_reference: Tensor | None = None
    """KL(pi || pi_ref) of the whole distributions at each token, with gradient; with "reference_model". [N]"""
    kl_from_reference: Tensor | None = None
    """KL(pi_ref || pi), likewise. [N]"""
    seeds: Sequence[int] = ()
    """What each answer's random numbers come from."""

    @property
    def answer_of_token(self) -> Tensor:
        """Index of the answer that each token belongs to, [N]."""
        lengths = self.length.long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    @property
    def position(self) -> Tensor:
        """Number of each token within its answer, from 0 on, [N]."""
        lengths, answers = self.length.long(), self.answer_of_token
        return torch.arange(len(answers), device=lengths.device) - (lengths.cumsum(0) - lengths)[answers]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over each answer's tokens, [N] -> [P]; 0 for an empty answer."""
        return sum_by_response(values, self.length.long())

    def random(self) -> Tensor:
        """A random number in [0, 1) for each token, [N] in fp64; other ones in each step, the same in any layout."""
        return uniform(self.seeds, self.length.long())

    @property
    def log_ratio(self) -> Tensor:
        """log pi(y|x) - log pi_ref(y|x)."""
        if self.reference_logp is None:
            raise lacking("reference")
        return self.logp - self.reference_logp

    @property
    def mean_logp(self) -> Tensor:
        """log pi(y|x) / |y|; 0 for an empty answer."""
        return self.logp / self.length.clamp(min=1)


@dataclass(frozen=True)
class Pairs:
    """P preference pairs of an optimizer step."""

    chosen: Answers
    rejected: Answers
    weights: Tensor
    """1, or 0 for a pair that only fills up; [P]."""
    total: int
    """Pairs of the optimizer step."""
    chosen_tokens: int
    """Response tokens of all chosen answers of the optimizer step."""
    statistics: Statistics = field(default_factory=dict)
    """What the algorithm's `statistics` and `update` found in the whole step."""
    step: int = 0
    """Number of the optimizer step, from 0 on."""
    steps: int = 1
    """Optimizer steps of the whole training."""
    places: Tensor | None = None
    """Place of each pair among those of the step; None where these are all of them. [P], integers"""
    tags: Sequence[tuple[str, ...]] = ()
    """Of each pair's prompt."""

    def mean(self, values: Tensor) -> Tensor:
        """The share of this micro-batch in the step's mean of one value per pair, [P] -> []."""
        return (self.weights * values).sum() / self.total

    def gather(self, values: Tensor) -> Tensor:
        """The share of this micro-batch in a vector with one value for each pair of the step, [P] -> [total]."""
        return _gather(self.weights * values, self.places, self.total)

    def own(self, values: Tensor) -> Tensor:
        """Of a vector with one value for each pair of the step, those of these pairs, [total] -> [P]."""
        return values if self.places is None else values.to(self.places.device)[self.places]

    def tagged(self, tag: str) -> Tensor:
        """Whether each pair's prompt has a tag, [P], booleans."""
        return _tagged(self.tags, tag, self.weights.device)

    def chosen_nll(self) -> Tensor:
        """The share of this micro-batch in the mean of -log pi over all chosen response tokens of the step, []."""
        return -(self.weights * self.chosen.logp).sum() / max(self.chosen_tokens, 1)

    def rewards(self, chosen: Tensor, rejected: Tensor) -> Figures:
        """The figures that people compare preference losses by, from the implicit rewards of both answers, [P] each."""
        chosen, rejected = chosen.detach(), rejected.detach()
        return {
            "accuracy": self.mean((chosen > rejected).float()),
            "chosen_reward": self.mean(chosen),
            "rejected_reward": self.mean(rejected),
            "margin": self.mean(chosen - rejected),
        }


@dataclass(frozen=True)
class Samples:
    """S responses with N tokens in all; tensors of shape [N] hold the tokens of one response after the other."""

    logprobs: Tensor
    """Per token, under the policy; with gradient. [N]"""
    entropy: Tensor
    """Of the policy's distribution at each token (nats); with gradient. [N]"""
    proximal: Tensor
    """Log-probabilities at the beginning of this training, by the trainer itself. [N]"""
    behaviour: Tensor
    """Log-probabilities of the policy that sampled, as the generation engine reported them. [N]"""
    advantages: Tensor
    """As `advantages` returned them. [N]"""
    lengths: Tensor
    """Tokens of each response, at least 1. [S], integers"""
    weights: Tensor
    """1, or 0 for a response that only fills up. [S]"""
    total: int
    """Responses of the optimizer step."""
    total_tokens: int
    """Response tokens of the optimizer step."""
    reference: Tensor | None = None
    """Log-probabilities under the reference policy, if the algorithm needs them. [N]"""
    values: Tensor | None = None
    """Of the value head, with gradient, where policy and critic share a backbone. [N]"""
    old_values: Tensor | None = None
    """Of the critic before this training. [N]"""
    returns: Tensor | None = None
    """What the critic learns, as `advantages` returned them. [N]"""
    statistics: Statistics = field(default_factory=dict)
    """What the algorithm's `statistics` and `update` found in the whole step."""
    rewards: Tensor | None = None
    """Of each response, as it was scored. [S]"""
    prompts: Tensor | None = None
    """Number of the prompt that each response answers, from 0 on within this micro-batch, which has all responses to a
    prompt or none. [S], integers in ascending order"""
    total_prompts: int = 1
    """Prompts of the optimizer step."""
    truncated: Tensor | None = None
    """Whether the response was cut off by the token limit (`finish_reason` is "length"). [S], booleans"""
    kl_to_reference: Tensor | None = None
    """KL(pi || pi_ref) of the whole distributions at each token, with gradient; with "reference_model". [N]"""
    kl_from_reference: Tensor | None = None
    """KL(pi_ref || pi), likewise. [N]"""
    step: int = 0
    """Number of the optimizer step, from 0 on."""
    steps: int = 1
    """Optimizer steps of the whole training."""
    places: Tensor | None = None
    """Place of each response among those of the step; None where these are all of them. [S], integers"""
    tags: Sequence[tuple[str, ...]] = ()
    """Of each response's prompt."""
    seeds: Sequence[int] = ()
    """What each response's random numbers come from."""

    def sum_by_response(self, values: Tensor) -> Tensor:
        """[N] -> [S]"""
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
        """Of a vector with one value for each response of the step, those of these responses, [total] -> [S]."""
        return values if self.places is None else values.to(self.places.device)[self.places]

    def tagged(self, tag: str) -> Tensor:
        """Whether each response's prompt has a tag, [S], booleans."""
        return _tagged(self.tags, tag, self.weights.device)

    def random(self) -> Tensor:
        """A random number in [0, 1) for each token, [N] in fp64; other ones in each step, the same in any layout."""
        return uniform(self.seeds, self.lengths)


def _gather(values: Tensor, places: Tensor | None, total: int) -> Tensor:
    return values if places is None else values.new_zeros(total).index_add(0, places, values)


def _tagged(tags: Sequence[tuple[str, ...]], tag: str, device: torch.device) -> Tensor:
    return torch.tensor([tag in own for own in tags], dtype=torch.bool, device=device)


@dataclass(frozen=True)
class Step:
    """A whole optimizer step, as `update` sees it: once, before the loss, and alike in every process."""

    step: int
    """Number of the optimizer step, from 0 on."""
    steps: int
    """Optimizer steps of the whole training."""
    statistics: Statistics
    """What `statistics` found; vectors are in fp64 on the CPU."""
    state: dict[str, float]
    """What `update` returned in the step before under the names in STATE; in the first step the values there."""
    generator: torch.Generator
    """For random decisions: the same in every process, another one in each step."""


@dataclass(frozen=True)
class Experience:
    """All scored samples of an iteration: S responses with N tokens in all, in fp64 on the CPU."""

    rewards: Tensor
    """Of each response. [S]"""
    prompts: Tensor
    """Number of the prompt that each response answers, from 0 on, in ascending order. [S], integers"""
    lengths: Tensor
    """Tokens of each response, at least 1. [S], integers"""
    behaviour: Tensor
    """Log-probabilities of the policy that sampled (nats). [N]"""
    kl_coefficient: float
    """Weight of the penalty on the KL divergence from the reference, for this iteration."""
    reference: Tensor | None = None
    """Log-probabilities under the reference policy, if the algorithm needs them. [N]"""
    values: Tensor | None = None
    """The critic's, if the algorithm needs them: of the state in which each token was chosen. [N]"""
    greedy: Tensor | None = None
    """Reward of the greedy answer to each response's prompt, if the algorithm needs it. [S]"""
    token_rewards: Tensor | None = None
    """The scorer's reward for each token, if the algorithm needs it. [N]"""
    truncated: Tensor | None = None
    """Whether the response was cut off by the token limit (`finish_reason` is "length"). [S], booleans"""
    tags: Sequence[tuple[str, ...]] = ()
    """Of each response's prompt."""

    def tagged(self, tag: str) -> Tensor:
        """Whether each response's prompt has a tag, [S], booleans."""
        return _tagged(self.tags, tag, self.rewards.device)

    @property
    def response_of_token(self) -> Tensor:
        """Index of the response that each token belongs to, [N]."""
        return owners(self.lengths, len(self.behaviour))


@dataclass(frozen=True)
class Advantages:
    """What an algorithm makes of an `Experience`."""

    advantages: Tensor
    """How much better each token was than expected. [N]"""
    returns: Tensor | None = None
    """What the critic is to learn, for algorithms that need one. [N]"""
    keep: Tensor | None = None
    """Which responses are trained on; the others are dropped and counted. None: all of them. [S], booleans"""
