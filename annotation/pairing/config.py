"""Configuration of the stage `pairs`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import field_validator, model_validator

from annotation.pairing.strategies import STRATEGIES, Candidate, PairPrompt, Proposal, every_pair
from contracts.callables import load_callable, source_files
from contracts.config import PathText, Section, StageConfig, identity, input_path, runtime
from contracts.errors import did_you_mean


class PairsSettings(Section):
    """Settings of pair selection."""

    strategy: PathText = identity("max_min")
    """max_min, max_random, max_max, all, top_k_bottom_k, length_matched, correct_against_wrong or uncertainty, see
    docs/pairs.md; or a function of your own, file.py:function or package.module:function, called once per prompt as
    function(candidates, prompt, **settings), which returns pairs of sample indices."""
    settings: dict[str, Any] = identity({}, later=True)
    """The strategy's settings: {top: 2, bottom: 2} for top_k_bottom_k, {tolerance: 0.1} for length_matched, {threshold:
    0.5} for correct_against_wrong, {parts: [a, b], sure: false} for uncertainty; the further keyword arguments of your
    own function."""
    length_penalty: float = identity(0.0, ge=0)
    """Penalty per response token, subtracted from the score before selection."""
    distinct: bool = identity(False, later=True)
    """Of identical responses to a prompt, keep only the first; the others are counted. Without it only pairs of two
    identical responses are dropped."""
    margin: float = identity(0.0, ge=0)
    """Pairs whose scores differ by less are dropped and counted; ties always are."""
    margin_cap: float | None = identity(None, gt=0, later=True)
    """Pairs whose scores differ by more are dropped and counted."""
    per_prompt: int | None = identity(None, ge=1, later=True)
    """Maximum number of pairs per prompt: those that the strategy prefers, after all other filters. By default all that
    it proposes."""
    max_dropped: float = identity(0.95, ge=0, le=1)
    """Stop when a larger share of the pairs is dropped, not counting those beyond per_prompt."""
    seconds_per_prompt: float = runtime(60.0, gt=0)
    """Time limit of your own function for one prompt; exceeding it stops the stage."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and "function" in data:  # the key that scorers use
            raise ValueError(f"there is no key function. Set your own function as strategy={data['function']}.")
        return data

    @field_validator("strategy")
    @classmethod
    def _check_strategy(cls, value: str) -> str:
        if value not in STRATEGIES and ":" not in value:
            raise ValueError(
                f"there is no such strategy.{did_you_mean(value, STRATEGIES)} There are {', '.join(STRATEGIES)}; one "
                "of your own is file.py:function."
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.is_own:
            STRATEGIES[self.strategy].settings(self.settings)
        if self.margin_cap is not None and self.margin_cap < self.margin:
            raise ValueError(
                f"margin_cap is {self.margin_cap:g}, below margin ({self.margin:g}): no pair would be left."
            )
        return self

    @property
    def is_own(self) -> bool:
        """Whether the strategy is a user's own function."""
        return self.strategy not in STRATEGIES

    @property
    def recorded_name(self) -> str:
        """The strategy's name as recorded in pairs; the folders of a user's own file are left out."""
        return self.strategy.rpartition("/")[2] if self.is_own else self.strategy

    def most(self, answers: int) -> int:
        """Maximum number of pairs for a prompt with this many answers."""
        most = every_pair(answers, self.settings)
        if not self.is_own:
            strategy = STRATEGIES[self.strategy]
            most = strategy.most(answers, strategy.settings(self.settings))
        return most if self.per_prompt is None else min(most, self.per_prompt)

    def load(self) -> Callable[[list[Candidate], PairPrompt], Proposal]:
        """The strategy function, bound to its settings.

        Raises:
            UserError: the user's own function cannot be imported.
        """
        if self.is_own:
            return functools.partial(load_callable(self.strategy), **self.settings)
        strategy = STRATEGIES[self.strategy]
        return functools.partial(strategy.propose, **strategy.settings(self.settings))


class PairsConfig(PairsSettings, StageConfig):
    """Choose preference pairs among the scored completions of each prompt."""

    stage: ClassVar[str] = "pairs"
    code_version: ClassVar[int] = 2

    rollouts: Path = input_path()
    """Published rollouts, with at least two completions per prompt."""
    scores: Path = input_path()
    """Published scores of those rollouts; the score that selects is the score that labels."""
    seed: int = identity(0, ge=0)
    """Seed of random strategies."""

    def source_files(self) -> dict[str, Path]:
        """The file of a user's own strategy, and the user's own modules that it imports."""
        return source_files(self.strategy) if self.is_own else {}
