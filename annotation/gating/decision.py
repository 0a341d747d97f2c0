"""Decides by the gates how a run continues: a pure function of metrics and of the previous decision."""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from annotation.gating.config import Basis, GateConfig, GateSettings
from contracts.artifacts import Artifact
from contracts.config import Role
from contracts.errors import UserError
from contracts.records import GATE

FILE = "gate.json"
RANKING_METRICS = ("gold_reward_mean", "reward_mean")
"""Metrics that rank policies; the first one that exists is used."""


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A policy's values of the metrics that gates use, each with the half width of its 95 % interval (0 if none)."""

    iteration: int
    values: dict[str, tuple[float, float] | None]

    @classmethod
    def of(cls, metrics: Mapping[str, Any], config: GateConfig) -> "Measured":
        """Select the metrics from those of an evaluation."""
        names = sorted({*RANKING_METRICS, *(gate.metric for gate in config.conditions.values())})
        return cls(int(metrics["iteration"]), {name: _value(metrics, name) for name in names})


class GateDecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a run continues after an iteration, with the state that the next decision needs."""

    iteration: int
    action: Literal["go on", "stop", "rollback"]
    start: int
    """The iteration whose policy the next one starts from."""
    gate: str | None
    """The gate that decided."""
    reason: str | None
    """The reason, in one sentence."""
    warnings: dict[str, str]
    """Messages of other gates, by their names."""
    holds: dict[str, bool | None]
    """Whether each gate's condition holds for this policy; None: its metric is unknown or was not measured in this
    iteration."""
    refused: bool
    """Whether the condition of a gate that stops or rolls back holds; this policy is then never the best, regardless of
    its reward."""
    streaks: dict[str, int]
    """For each gate, the consecutive iterations since the last rollback in which its condition held, not counting
    iterations without its metric."""
    rollbacks: dict[str, int]
    """Number of rollbacks by each gate."""
    initial: Measured
    last: Measured
    """The policy that the next iteration starts from."""
    best: Measured
    """The best policy so far."""

    @property
    def text(self) -> str:
        """The reason and all warnings, one sentence each."""
        warned = [
            f"the gate {name} warns of {_policy(self.iteration)}: {text}." for name, text in self.warnings.items()
        ]
        return " ".join([*filter(None, [self.reason]), *warned])


def ranking_metric(metrics: Mapping[str, Any]) -> str:
    """The metric that policies are ranked by: the gold reward if there is one, otherwise the reward."""
    return next((name for name in RANKING_METRICS[:-1] if metrics.get(name) is not None), RANKING_METRICS[-1])


def published_decision(config: GateConfig) -> GateDecision | None:
    """The published decision, if it was made with exactly this config's gates; otherwise None."""
    try:
        artifact = Artifact.open(config.output, GATE)
    except UserError:
        return None
    asked = {"code": config.code_version, "config": json.loads(json.dumps(config.select(Role.IDENTITY), default=str))}
    if not asked.items() <= artifact.manifest.key_parts.items():
        return None
    return msgspec.convert(artifact.manifest.facts["gate"], GateDecision)


def decide(config: GateConfig, initial: Measured, now: Measured, earlier: GateDecision | None) -> GateDecision:
    """Decide after an iteration.

    Stopping takes precedence over rolling back, and rolling back over warnings; among gates with the same action the
    first by name decides.
    """
    gates = dict(sorted(config.conditions.items()))
    metric = ranking_metric(initial.values)
    best = earlier.best if earlier else initial
    bases: dict[Basis, Measured] = {"initial": initial, "previous": earlier.last if earlier else initial, "best": best}
    texts: dict[str, str] = {}
    holds: dict[str, bool | None] = {}
    streaks: dict[str, int] = {}
    for name, gate in gates.items():
        before = earlier.streaks.get(name, 0) if earlier else 0
        if not config.is_measured(gate):
            holds[name], streaks[name] = None, before
            continue
        found = _holds(gate, now, bases) if config.iteration >= gate.first else (False, "")
        holds[name], texts[name] = found
        streaks[name] = before + 1 if holds[name] else 0
    rollbacks = {name: earlier.rollbacks.get(name, 0) if earlier else 0 for name in gates}
    refused = any(holds[name] for name, gate in gates.items() if gate.do != "warn")
    if not refused:
        best = _better(now, best, metric)
    warnings = {name: text for name, text in texts.items() if holds[name] is None}
    action: Literal["go on", "stop", "rollback"] = "go on"
    decided, reason, start = None, None, now
    for name, gate in sorted(gates.items(), key=lambda item: _action_rank(item[1], rollbacks[item[0]])):
        if streaks[name] < gate.patience or name not in texts:
            continue
        rank = _action_rank(gate, rollbacks[name])
        lasting = f" for {streaks[name]} iterations in a row" if gate.patience > 1 else ""
        text = f"{texts[name]}{lasting}"
        if decided is not None or rank == WARN:
            warnings[name] = text
            continue
        decided = name
        if rank == STOP:
            more = f", and it has rolled back {_times(rollbacks[name])} already" if gate.do == "rollback" else ""
            action = "stop"
            reason = f"the gate {name} stops the run after iteration {now.iteration}: {text}{more}."
        else:
            action, start = "rollback", best
            reason = (
                f"the gate {name} rolls back after iteration {now.iteration}: {text}; iteration {now.iteration + 1} "
                f"starts from {_policy(best.iteration)}, the best by {metric}."
            )
    if action == "rollback":
        assert decided is not None
        rollbacks[decided] += 1
        streaks = dict.fromkeys(streaks, 0)
    return GateDecision(
        now.iteration,
        action,
        start.iteration,
        decided,
        reason,
        warnings,
        holds,
        refused,
        streaks,
        rollbacks,
        initial,
        start,
        best,
    )


STOP, ROLLBACK, WARN = 0, 1, 2


def _action_rank(gate: GateSettings, rollbacks: int) -> int:
    """The action of a gate whose condition holds, as a rank: the most severe first."""
    if gate.do == "rollback":
        return ROLLBACK if rollbacks < gate.at_most else STOP
    return STOP if gate.do == "stop" else WARN


def _holds(gate: GateSettings, now: Measured, bases: Mapping[Basis, Measured]) -> tuple[bool | None, str]:
    """Whether a gate's condition holds (None: unknown), and a description of the comparison.

    With a basis, the two policies' intervals are treated as independent: the half width for x - f y is then
    sqrt(h_x^2 + f^2 h_y^2). If both answered the same prompts, their metrics are usually positively correlated, and
    that half width is too large: a gate then acts late rather than early.
    """
    measured = now.values[gate.metric]
    basis = bases[gate.basis].values[gate.metric] if gate.basis else (0.0, 0.0)
    if measured is None or basis is None:
        whose = _policy((now if measured is None else bases[gate.basis or "initial"]).iteration)
        return None, f"{gate.metric} of {whose} is not known, so that nothing can be decided by it"
    factor = gate.bound if gate.relative_to else 1.0
    difference = measured[0] - factor * basis[0] - (0.0 if gate.relative_to else gate.bound)
    half = math.hypot(measured[1], factor * basis[1]) if gate.interval else 0.0
    holds = difference - half > 0 if gate.above is not None else difference + half < 0
    return holds, f"{gate.metric} is {_number(measured, gate)}, {_bound_in_words(gate, basis, bases)}"


def _bound_in_words(gate: GateSettings, basis: tuple[float, float], bases: Mapping[Basis, Measured]) -> str:
    side = "above" if gate.above is not None else "below"
    if gate.basis is None:
        return f"{side} {gate.bound:g}"
    of = f"the {_number(basis, gate)} of {_policy(bases[gate.basis].iteration)}"
    if gate.relative_to:
        return f"{side} {gate.bound:g} times {of}"
    beyond = gate.bound if gate.above is not None else -gate.bound
    return f"{side} {of} {gate.bound:+g}" if beyond < 0 else f"{side} {of} by more than {beyond:g}"


def _better(one: Measured, other: Measured, metric: str) -> Measured:
    """The better of two policies; `other`, the earlier one, if they are equal or cannot be compared."""
    new, old = one.values[metric], other.values[metric]
    if new is None or old is None:
        return one if old is None and new is not None else other
    return one if new[0] > old[0] else other


def _value(metrics: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    value = metrics.get(name)
    if value is None or not math.isfinite(value):
        return None
    return float(value), float(metrics.get(f"{name.removesuffix('_mean')}_ci95") or 0.0)


def _number(measured: tuple[float, float], gate: GateSettings) -> str:
    value, half = measured
    return f"{value:.4g} ± {half:.2g}" if gate.interval and half else f"{value:.4g}"


def _policy(iteration: int) -> str:
    return f"iteration {iteration}" if iteration else "the initial policy"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
