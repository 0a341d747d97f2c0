"""Configuration of gates and of the gate stage."""

import math
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeAlias

from pydantic import model_validator

from contracts.config import Section, StageConfig, identity, input_path

Basis: TypeAlias = Literal["initial", "previous", "best"]
"""The policy to compare with: the initial one, the previous one, or the best one so far."""
SHARES = ("win_rate", "win_rate_previous", "stop_rate", "distinct_1", "distinct_2", "distinct_3", "self_similarity")
"""Metrics in [0, 1]."""
CORRELATIONS = ("spearman_", "kendall_")
"""Prefixes of metrics in [-1, 1]."""


class GateSettings(Section):
    """A condition on a held-out metric, and the action if it holds."""

    metric: str = identity()
    """The metric, as evaluations name it: response_length, kl, win_rate_previous; docs/gates.md lists all. For your own
    evaluations NAME/METRIC."""
    above: float | None = identity(None, ge=-1e9, le=1e9)
    """The condition holds if the metric is above this; set this or `below`."""
    below: float | None = identity(None, ge=-1e9, le=1e9)
    """The condition holds if the metric is below this."""
    relative_to: Basis | None = identity(None)
    """The bound is a multiple of the metric of another policy: the initial one, the previous one, or the best so far.
    For metrics that are never negative."""
    difference_to: Basis | None = identity(None)
    """The bound is a difference from the metric of another policy."""
    interval: bool = identity(True)
    """Require the whole 95 % interval to be beyond the bound, for metrics that have one; otherwise only the value
    counts."""
    patience: int = identity(1, ge=1)
    """Consecutive iterations in which the condition must hold before the action."""
    first: int = identity(1, ge=1)
    """The first iteration that the gate applies to; raise it to continue a run that the gate has stopped."""
    do: Literal["warn", "stop", "rollback"] = identity()
    """Warn; or end the run; or have the next iteration start from the best policy so far."""
    at_most: int = identity(1, ge=1)
    """Maximum number of rollbacks by this gate; the next one stops the run instead."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.above is None) == (self.below is None):
            what = "neither above nor below is set" if self.above is None else "above and below are both set"
            raise ValueError(f"{what}, and the condition has one bound: give either above or below.")
        if self.relative_to and self.difference_to:
            raise ValueError("relative_to makes the bound a multiple, difference_to a difference: give one of the two.")
        low, high = range_of(self.metric)
        if self.metric == "win_rate_previous" and "initial" in (self.relative_to, self.difference_to):
            raise ValueError("the initial policy has no win_rate_previous, so this can never hold.")
        if self.at_most != 1 and self.do != "rollback":
            raise ValueError(f"at_most is for do=rollback, and do is {self.do}.")
        self.require_possible(low, high)
        return self

    @property
    def bound_error(self) -> str | None:
        """Why its bound is meaningless, or None. Checked only when the metric is known to exist."""
        if self.relative_to and range_of(self.metric)[0] < 0:
            return f"{self.metric} can be negative, and a multiple of it means nothing. Use difference_to."
        return None

    @property
    def bound(self) -> float:
        """The value of `above` or `below`."""
        return self.above if self.above is not None else self.below or 0.0

    @property
    def basis(self) -> Basis | None:
        """The policy to compare with, if any."""
        return self.relative_to or self.difference_to

    @property
    def evaluation(self) -> str | None:
        """Name of the user's own evaluation that the metric is from, if it is from one."""
        return self.metric.partition("/")[0] if "/" in self.metric else None

    def require_possible(self, low: float, high: float) -> None:
        """Raise ValueError if no value of the metric in [`low`, `high`] can be beyond the bound."""
        if self.difference_to:
            low, high = low - high, high - low
        elif self.relative_to:
            low, high = 0.0, math.inf
        if self.above is not None and self.above >= high:
            raise ValueError(f"above={self.above:g} can never hold: {self._subject} is at most {high:g}.")
        if self.below is not None and self.below <= low:
            raise ValueError(f"below={self.below:g} can never hold: {self._subject} is at least {low:g}.")

    @property
    def _subject(self) -> str:
        if self.difference_to:
            return f"a difference of {self.metric}"
        return f"a multiple of {self.metric}" if self.relative_to else self.metric


def range_of(metric: str) -> tuple[float, float]:
    """Minimum and maximum of a metric."""
    if metric in SHARES:
        return 0.0, 1.0
    if metric.startswith(CORRELATIONS):
        return -1.0, 1.0
    return (0.0 if metric in ("response_length", "reward_uncertainty") else -math.inf), math.inf


class GateConfig(StageConfig):
    """Decide by the gates how a run continues after an iteration."""

    stage: ClassVar[str] = "gate"
    code_version: ClassVar[int] = 1

    conditions: dict[str, GateSettings] = identity(min_length=1)
    """The gates, by name."""
    iteration: int = identity(ge=1)
    """Number of the evaluated policy."""
    evaluation: Path = input_path()
    """Published evaluation of this policy."""
    initial: Path = input_path()
    """Published evaluation of the initial policy."""
    earlier: Path | None = input_path(None)
    """The decision after the previous iteration; None: this is the first."""
    evaluations: dict[str, Path] = input_path({})
    """Your own evaluations of this policy, by the names that gates use."""
    initial_evaluations: dict[str, Path] = input_path({})
    """Your own evaluations of the initial policy, by the same names."""

    @model_validator(mode="after")
    def _check_conditions(self) -> Self:
        for name, gate in self.conditions.items():
            if gate.bound_error:
                raise ValueError(f"conditions.{name}: {gate.bound_error}")
        return self

    def is_measured(self, gate: GateSettings) -> bool:
        """Whether a gate's metric is measured in this iteration; a user's own evaluation may skip iterations."""
        return gate.evaluation is None or gate.evaluation in self.evaluations
