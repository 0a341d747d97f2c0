"""The built-in pair strategies: pure functions of the candidates of one prompt.

A strategy is a function `strategy(candidates, prompt, *, setting=default, ...)`. It gets at least two candidates, best
first, and returns (chosen, rejected) pairs of their sample indices in order of preference; or, if it finds none, a word
for the reason, which the ledger counts. The config names a built-in strategy, or the file or import path of a user's
own, which has the same interface. The rules that hold for all strategies (margins, limits, dropped pairs) are in
`annotation.pairing.choice`.
"""

import inspect
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, TypeAlias

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from contracts.errors import UserError, did_you_mean

Samples: TypeAlias = tuple[int, int]
"""Sample indices of the chosen and the rejected answer."""
Proposal: TypeAlias = Iterable[Samples] | str
"""The return value of a strategy: pairs, or the reason for which there are none."""
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Several = Annotated[list[str], Field(min_length=2)]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)

UNMATCHED = "no_answers_of_like_length"
ALL_CORRECT = "all_correct"
ALL_WRONG = "all_wrong"


class Candidate(NamedTuple):
    """A scored answer, as passed to strategies."""

    sample: int
    """Index among the answers to the prompt."""
    response_ids: tuple[int, ...]
    score: float
    """The score that pairs are selected and labelled by, with the length penalty already subtracted."""
    text: str = ""
    finish_reason: str = "stop"
    """The finish reason in the rollouts; "length": truncated by the token limit."""
    parts: Mapping[str, float] = MappingProxyType({})
    """The parts of the score, by name."""


class PairPrompt(NamedTuple):
    """The prompt that the candidates answer."""

    prompt_id: str
    messages: list[dict[str, Any]]
    answer: str | None
    """The prompt's known answer, if it has one."""
    tags: list[str]
    seed: int
    """Seed for random choices; differs between prompts and between the iterations of a run."""


@dataclass(frozen=True)
class PairStrategy:
    """A built-in strategy."""

    name: str
    propose: Callable[..., Proposal]
    most: Callable[[int, Mapping[str, Any]], int]
    """Maximum number of pairs that it proposes, given the number of answers and all its settings; for estimates."""

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters of the function: its settings."""
        found = inspect.signature(self.propose).parameters.items()
        return {name: parameter for name, parameter in found if parameter.kind is parameter.KEYWORD_ONLY}

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings: the given ones, and defaults for the rest.

        Raises:
            ValueError: a setting does not exist, has the wrong type or is out of bounds.
        """
        known = self.parameters
        checked = {name: parameter.default for name, parameter in known.items()}
        for name, value in given.items():
            if name not in known:
                its = f"Its settings: {', '.join(known)}." if known else "It has no settings."
                raise ValueError(f"strategy {self.name} has no setting {name!r}.{did_you_mean(str(name), known)} {its}")
            try:
                checked[name] = TypeAdapter(known[name].annotation, config=STRICT).validate_python(value)
            except ValidationError as error:
                wanted = " or ".join(filter(None, map(_wanted, error.errors())))
                raise ValueError(
                    f"strategy {self.name}: the setting {name} is {value!r}, but must be {wanted} (its default is "
                    f"{known[name].default})."
                ) from error
        return checked


def _wanted(problem: Any) -> str:
    """What a setting must be, for the message; empty for null, which the message gives as the default."""
    if problem["type"] == "too_short":
        return f"a list of at least {problem['ctx']['min_length']}"
    return "" if problem["type"] == "none_required" else problem["msg"].removeprefix("Input should be ")


STRATEGIES: dict[str, PairStrategy] = {}
"""The built-in strategies by the name that the config uses."""


def every_pair(answers: int, settings: Mapping[str, Any]) -> int:
    """Number of unordered pairs of `answers` answers."""
    return answers * (answers - 1) // 2


def _strategy(
    name: str, most: Callable[[int, Mapping[str, Any]], int] = every_pair
) -> Callable[[Callable[..., Proposal]], Callable[..., Proposal]]:
    def declare(propose: Callable[..., Proposal]) -> Callable[..., Proposal]:
        STRATEGIES[name] = PairStrategy(name, propose, most)
        return propose

    return declare


def _one(answers: int, settings: Mapping[str, Any]) -> int:
    return 1


@_strategy("max_min", _one)
def max_min(candidates: Sequence[Candidate], prompt: PairPrompt) -> Proposal:
    """The best against the worst of N answers: West-of-N (arXiv 2401.12086)."""
    return [(candidates[0].sample, candidates[-1].sample)]


@_strategy("max_random", _one)
def max_random(candidates: Sequence[Candidate], prompt: PairPrompt) -> Proposal:
    """The best against a random other answer, drawn with the prompt's seed, as in Zephyr (arXiv 2310.16944)."""
    best, *others = candidates
    return [(best.sample, others[prompt.seed % len(others)].sample)]


@_strategy("max_max", _one)
def max_max(candidates: Sequence[Candidate], prompt: PairPrompt) -> Proposal:
    """The best against the second best."""
    return [(candidates[0].sample, candidates[1].sample)]


@_strategy("all")
def all_pairs(candidates: Sequence[Candidate], prompt: PairPrompt) -> Proposal:
    """Every pair of answers, as in InstructGPT (arXiv 2203.02155), largest margin first."""
    return _samples(sorted(_pairs(candidates), key=_margin, reverse=True))


@_strategy("top_k_bottom_k", lambda answers, its: min(every_pair(answers, its), its["top"] * its["bottom"]))
def top_k_bottom_k(
    candidates: Sequence[Candidate], prompt: PairPrompt, *, top: Count = 2, bottom: Count = 2
) -> Proposal:
    """Each of the `top` best against each of the `bottom` worst, largest margin first."""
    count = len(candidates)
    ranks = itertools.product(range(min(top, count)), range(max(0, count - bottom), count))
    found = [(candidates[better], candidates[worse]) for better, worse in ranks if better < worse]
    return _samples(sorted(found, key=_margin, reverse=True))


@_strategy("length_matched")
def length_matched(candidates: Sequence[Candidate], prompt: PairPrompt, *, tolerance: Share = 0.1) -> Proposal:
    """Pairs of similar length: the shorter answer is shorter than the longer one by at most the fraction `tolerance`.
    Largest margin first. Length then hardly predicts which answer was chosen (balanced pairs: arXiv 2310.03716)."""
    matched = [pair for pair in _pairs(candidates) if _difference(*pair) <= tolerance]
    return _samples(sorted(matched, key=_margin, reverse=True)) or UNMATCHED


@_strategy("correct_against_wrong", lambda answers, its: answers * answers // 4)
def correct_against_wrong(candidates: Sequence[Candidate], prompt: PairPrompt, *, threshold: float = 0.5) -> Proposal:
    """Answers with a score of at least `threshold` against answers below it, as in iterative reasoning preference
    optimization (arXiv 2404.19733). Best against worst first; no answer is reused before it has to be."""
    correct = [candidate for candidate in candidates if candidate.score >= threshold]
    wrong = [candidate for candidate in reversed(candidates) if candidate.score < threshold]
    if not wrong:
        return ALL_CORRECT
    if not correct:
        return ALL_WRONG
    rounds = max(len(correct), len(wrong))
    order = [(turn, turn + shift) for shift in range(rounds) for turn in range(rounds)]
    found = [(correct[one % len(correct)], wrong[other % len(wrong)]) for one, other in order]
    return list(dict.fromkeys(_samples(found)))


@_strategy("uncertainty")
def uncertainty(
    candidates: Sequence[Candidate], prompt: PairPrompt, *, parts: Several | None = None, sure: bool = False
) -> Proposal:
    """Every pair of answers, the ones that the scorer is least certain about first; with `sure`, last.

    Certainty is measured by the margin: under Bradley-Terry the preference probability is sigmoid(margin), which is
    close to 1/2 for small margins (certainty of a preference model: arXiv 2402.08114). If the score is composed of
    several scores of the same quality (an ensemble's, a judge's votes), `parts` names them; certainty is then the mean
    of their margins divided by the standard deviation of their margins.

    Raises:
        UserError: a score has no such part.
    """
    if parts is not None:
        for candidate in candidates:
            if missing := [name for name in parts if name not in candidate.parts]:
                there = ", ".join(candidate.parts) or "none"
                raise UserError(
                    f"strategy uncertainty: the score of prompt {prompt.prompt_id}, sample {candidate.sample}, has no "
                    f"part {missing[0]!r}. Its parts: {there}. Correct settings.parts, or leave it out to go by the "
                    "margin."
                )

    def certainty(pair: tuple[Candidate, Candidate]) -> float:
        return _margin(pair) if parts is None else _agreement([pair[0].parts[it] - pair[1].parts[it] for it in parts])

    return _samples(sorted(_pairs(candidates), key=certainty, reverse=sure))


def _agreement(margins: list[float]) -> float:
    mean, spread = statistics.fmean(margins), statistics.pstdev(margins)
    if spread == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / spread


def _pairs(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Candidate]]:
    """All pairs of a candidate with a lower-ranked one."""
    return itertools.combinations(candidates, 2)


def _samples(pairs: Iterable[tuple[Candidate, Candidate]]) -> list[Samples]:
    return [(chosen.sample, rejected.sample) for chosen, rejected in pairs]


def _margin(pair: tuple[Candidate, Candidate]) -> float:
    return pair[0].score - pair[1].score


def _difference(one: Candidate, other: Candidate) -> float:
    """Difference of the two lengths, as a fraction of the longer one."""
    shorter, longer = sorted((len(one.response_ids), len(other.response_ids)))
    return 1 - shorter / longer if longer else 0.0
