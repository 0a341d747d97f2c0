"""What gates decide after an iteration: a pure function of metrics and of what was decided before."""

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
JUDGES = ("gold_reward_mean", "reward_mean")
"""Metrics by which the best policy is chosen: the first that there is."""


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The metrics of a policy that gates ask for: each with half its 95 % interval, 0 where it has none."""

    iteration: int
    values: dict[str, tuple[float, float] | None]

    @classmethod
    def of(cls, metrics: Mapping[str, Any], config: GateConfig) -> "Measured":
        """Those of an evaluation."""
        names = sorted({*JUDGES, *(gate.metric for gate in config.conditions.values())})
        return cls(int(metrics["iteration"]), {name: _value(metrics, name) for name in names})


class GateDecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a run goes on after an iteration, with all that the next decision has to know."""

    iteration: int
    action: Literal["go on", "stop", "rollback"]
    start: int
    """The iteration whose policy the next one starts from."""
    gate: str | None
    """The one that has decided."""
    reason: str | None
    """Why, in one sentence."""
    warnings: dict[str, str]
    """What gates have to say beside that, by their names."""
    holds: dict[str, bool | None]
    """Whether each gate's condition holds for this policy; None: its metric is not known, or not of this iteration."""
    refused: bool
    """Whether one holds that stops or rolls back, so that this policy is not the best whatever its reward."""
    streaks: dict[str, int]
    """For how many iterations in a row each has held, since the last rollback; of those that it has a metric of."""
    rollbacks: dict[str, int]
    """How often each has rolled back."""
    initial: Measured
    last: Measured
    """The policy that the next iteration starts from."""
    best: Measured
    """The best so far."""

    @property
    def text(self) -> str:
        """All that the gates have to say, a sentence for each that has."""
        warned = [
            f"the gate {name} warns of {_policy(self.iteration)}: {text}." for name, text in self.warnings.items()
        ]
        return " ".join([*filter(None, [self.reason]), *warned])


def judge_of(metrics: Mapping[str, Any]) -> str:
    """The metric that decides which policy is best: the gold reward where there is one."""
    return next((name for name in JUDGES[:-1] if metrics.get(name) is not None), JUDGES[-1])


def published_decision(config: GateConfig) -> GateDecision | None:
    """What was decided under just these gates; None where nothing is published, or something else."""
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

    Stopping goes before rolling back, and that before warnings; among gates of one kind the first by name decides.
    """
    gates = dict(sorted(config.conditions.items()))
    judge = judge_of(initial.values)
    best = earlier.best if earlier else initial
    bases: dict[Basis, Measured] = {"initial": initial, "previous": earlier.last if earlier else initial, "best": best}
    said: dict[str, str] = {}
    holds: dict[str, bool | None] = {}
    streaks: dict[str, int] = {}
    for name, gate in gates.items():
        before = earlier.streaks.get(name, 0) if earlier else 0
        if not config.asks(gate):
            holds[name], streaks[name] = None, before
            continue
        found = _holds(gate, now, bases) if config.iteration >= gate.first else (False, "")
        holds[name], said[name] = found
        streaks[name] = before + 1 if holds[name] else 0
    rollbacks = {name: earlier.rollbacks.get(name, 0) if earlier else 0 for name in gates}
    refused = any(holds[name] for name, gate in gates.items() if gate.do != "warn")
    if not refused:
        best = _better(now, best, judge)
    warnings = {name: text for name, text in said.items() if holds[name] is None}
    action: Literal["go on", "stop", "rollback"] = "go on"
    decided, reason, start = None, None, now
    for name, gate in sorted(gates.items(), key=lambda item: _does(item[1], rollbacks[item[0]])):
        if streaks[name] < gate.patience or name not in said:
            continue
        does = _does(gate, rollbacks[name])
        lasting = f" for {streaks[name]} iterations in a row" if gate.patience > 1 else ""
        text = f"{said[name]}{lasting}"
        if decided is not None or does == WARN:
            warnings[name] = text
            continue
        decided = name
        if does == STOP:
            more = f", and it has rolled back {_times(rollbacks[name])} already" if gate.do == "rollback" else ""
            action = "stop"
            reason = f"the gate {name} stops the run after iteration {now.iteration}: {text}{more}."
        else:
            action, start = "rollback", best
            reason = (
                f"the gate {name} rolls back after iteration {now.iteration}: {text}; iteration {now.iteration + 1} "
                f"starts from {_policy(best.iteration)}, the best by {judge}."
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


def _does(gate: GateSettings, rollbacks: int) -> int:
    """What a gate does where it holds, the gravest first."""
    if gate.do == "rollback":
        return ROLLBACK if rollbacks < gate.at_most else STOP
    return STOP if gate.do == "stop" else WARN


def _holds(gate: GateSettings, now: Measured, bases: Mapping[Basis, Measured]) -> tuple[bool | None, str]:
    """Whether a condition holds, and the comparison in words.

    With a basis, the two policies' intervals count as independent: half the interval of x - f y is then
    sqrt(h_x^2 + f^2 h_y^2), which is too wide where both answered the same prompts, and so never acts too early.
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


def _better(one: Measured, other: Measured, judge: str) -> Measured:
    """The better of two, the earlier one where they are equal or nobody knows."""
    new, old = one.values[judge], other.values[judge]
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
