"""Checks the section `gates` before a run: conditions that can never hold, and rollbacks that are not possible."""

from collections.abc import Sequence
from typing import Any

from contracts.config import validate
from contracts.errors import UserError, did_you_mean
from pipelines.config.changes import merge, require_changeable
from pipelines.config.run import RunConfig
from pipelines.config.sections import GateSection

STANDARD_METRICS = (
    "reward_mean kl response_length stop_rate win_rate win_rate_previous distinct_1 distinct_2 distinct_3 "
    "self_similarity"
).split()
"""Metrics that every evaluation has."""
UNCERTAINTY = "reward_uncertainty"


def condition(section: GateSection) -> dict[str, Any]:
    """The fields of a gate that its stage reads."""
    return section.model_dump(exclude_unset=True, exclude={"changes"})


def known_metrics(config: RunConfig) -> list[str]:
    """The metrics of a run's evaluations that gates can refer to."""
    found = [*STANDARD_METRICS, *([UNCERTAINTY] if config.scorers["reward"].ensemble else [])]
    for name in config.scorers:
        if name != "reward":
            found += ["gold_reward_mean" if name == "gold" else f"{name}_mean", f"spearman_{name}", f"kendall_{name}"]
    return found


def require_possible_gates(configs: Sequence[RunConfig]) -> None:
    """Check the gates of a run against the rest of its config.

    Args:
        configs: the config at the start, and from each of the `changes` on.

    Raises:
        UserError: a metric does not exist or is never computed, a condition can never hold, or a rollback is not
            possible.
    """
    for name, gate in configs[0].gates.items():
        place = f"gates.{name}"
        _require_metric(place, gate, configs[0])
        if gate.bound_error:
            raise UserError(f"{place}: {gate.bound_error}")
        if all(reasons := [_why_impossible(gate, config) for config in configs]):
            raise UserError(f"{place} can never hold: {reasons[0]}")
        if gate.do == "rollback":
            _require_rollback(place, gate, configs)


def _require_metric(place: str, gate: GateSection, config: RunConfig) -> None:
    """Raise UserError unless evaluations have the metric. The metrics of the user's own evaluations are not known
    here."""
    own = config.evaluations
    if gate.evaluation in own:
        if gate.basis == "previous" and own[gate.evaluation].every > 1:
            raise UserError(
                f"{place} compares {gate.metric} with that of the previous policy, but by evaluations.{gate.evaluation}"
                f".every={own[gate.evaluation].every} that is never evaluated. Compare with initial, or set every=1."
            )
        return
    known = known_metrics(config)
    if gate.metric == UNCERTAINTY and UNCERTAINTY not in known:
        raise UserError(
            f"{place}.metric is {UNCERTAINTY}, by how much the scorers of an ensemble disagree, but scorers.reward "
            f"({config.scorers['reward'].display_name}) is no ensemble. Combine two scorers or more, for example "
            "scorers.reward={kind: combined, expression: 'mean(one, other)'}, or decide by another metric."
        )
    if gate.metric not in known:
        tried = gate.metric.removeprefix("eval/")
        hint = did_you_mean(tried, known)
        if tried.partition("/")[0] in own:
            hint = f" Did you mean {tried!r}?"
        names = [*known, *(f"{name}/METRIC" for name in own)]
        raise UserError(
            f"{place}.metric is {gate.metric!r}, which evaluations do not have.{hint} They have: {', '.join(names)}."
        )


def _why_impossible(gate: GateSection, config: RunConfig) -> str | None:
    """Why a condition can never hold, or None if it can."""
    sampling, metric = config.evaluation, gate.metric
    if metric == "kl" and (sampling.temperatures, sampling.top_p, sampling.top_k) != ([1.0], 1.0, 0):
        return (
            f"kl is estimated from answers at temperature 1, top_p 1 and top_k 0, but evaluation samples at "
            f"temperatures={sampling.temperatures}, top_p={sampling.top_p:g}, top_k={sampling.top_k}."
        )
    if (metric == "self_similarity" or metric.startswith("kendall_")) and sampling.k < 2:
        return f"{metric} compares several answers to a prompt, but evaluation.k={sampling.k} samples one. Set it to 4."
    if metric == "win_rate_previous" and config.scorers["reward"].compares:
        return (
            f"win_rate_previous compares scores of two policies' answers, but scorers.reward.kind="
            f"{config.scorers['reward'].kind} only says how often an answer beats the initial policy's. Use win_rate."
        )
    longest = float(sampling.max_new_tokens)
    if metric == "response_length" and gate.basis is None and gate.above is not None and gate.above >= longest:
        return f"above={gate.above:g}, but answers have at most evaluation.max_new_tokens={longest:g} tokens."
    return None


def _require_rollback(place: str, gate: GateSection, configs: Sequence[RunConfig]) -> None:
    """Raise UserError unless a gate can roll the run back, and its changes give a valid config."""
    require_changeable(gate.changes, 1, f"{place}.changes")
    for config in configs:
        data = merge(config.model_dump(exclude_unset=True, exclude={"changes"}), gate.changes)
        validate(type(config), data, f"with {place}.changes")
