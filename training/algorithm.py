"""What an algorithm is: a Python file with a loss, and what that loss sees of an optimizer step.

An algorithm that learns from preference pairs:

    READS = "pairs"
    NEEDS = ("reference",)          # "reference": log-probabilities of the reference policy; "collision": see `Answers`

    def loss(batch: Pairs, *, beta: float = 0.1) -> dict[str, Tensor]: ...

One that learns from scored samples (`training/experience.py` calls `advantages` once per iteration, on all of them):

    READS = "samples"
    NEEDS = ("reference", "values")  # "values": of a critic; "greedy": rewards of greedy answers to the same prompts

    def advantages(experience: Experience, *, gamma: float = 1.0) -> Advantages: ...
    def loss(batch: Samples, *, clip: float = 0.2) -> dict[str, Tensor]: ...

The keyword arguments are the algorithm's settings. READS, NEEDS and the settings are read without running the file, so
they must be written out as above.

A loss returns figures, `loss` among them; each is this micro-batch's share of a mean over the whole optimizer step,
which `batch.mean` and `batch.token_mean` compute. So the shares of all micro-batches and processes add up to the step's
figure, however the step was divided. What needs the whole step first (a batch mean inside of a nonlinearity) comes from
a function `statistics(batch, **settings)` of the same form, which runs over the step without gradients; the loss finds
its figures, added up, in `batch.statistics`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from contracts.errors import UserError

Figures = dict[str, Tensor]


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


@dataclass(frozen=True)
class Answers:
    """One answer of each of P pairs. Every tensor has shape [P]."""

    logp: Tensor
    """Summed log-probability of the response tokens under the policy (nats); the only one with a gradient."""
    length: Tensor
    """Response tokens, as floats."""
    score: Tensor
    """Score that the pair was chosen by."""
    reference_logp: Tensor | None = None
    """Summed log-probability under the reference policy, if the algorithm needs it."""
    log_collision: Tensor | None = None
    """Sum over the response tokens of log sum_v p(v)^2 under the policy, without gradient, if it is needed."""

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
    statistics: dict[str, float] = field(default_factory=dict)
    """What the algorithm's `statistics` found in the whole step."""

    def mean(self, values: Tensor) -> Tensor:
        """The share of this micro-batch in the step's mean of one value per pair, [P] -> []."""
        return (self.weights * values).sum() / self.total

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
    statistics: dict[str, float] = field(default_factory=dict)
    """What the algorithm's `statistics` found in the whole step."""

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
