"""Runs a whole search: evaluates the fixed strategies, searches for better plans, and decides which plan to use."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from contracts.errors import UserError
from pipelines.config.executor import LOCAL_KINDS
from pipelines.config.placement import STRATEGIES
from pipelines.graph import Node
from pipelines.iteration import build_graph
from pipelines.planning.search.comparing import CONFIDENCE, PlanComparison, compare, error_of
from pipelines.planning.search.evaluation import (
    ExpectedRun,
    ImpossiblePlanError,
    PlanTable,
    SearchedRun,
    UnknownCostError,
    evaluate,
)
from pipelines.planning.search.exploring import BestPlan, explore, lower_bound
from pipelines.planning.search.plans import fixed_section, jobs_section, section_of
from pipelines.text import format_duration, plural

AS_WRITTEN = "as written"
"""Name of the config's own plan, if it is not one of the plain strategies."""
FOUND = "found"
"""Name of the best plan that the search has found."""
CAUTIOUS = "cautious"
"""Name of the best plan that uses only layouts of earlier runs or of the strategies."""
HORIZON = 2
"""Number of iterations, plus the lag, that the search simulates; the final comparison simulates all of the run's."""


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    fixed: Mapping[str, ExpectedRun]
    """The possible fixed strategies, by name."""
    impossible: Mapping[str, str]
    """The impossible ones, with the reason."""
    found: ExpectedRun | None
    """The best plan; None if none is possible."""
    cautious: ExpectedRun | None
    """The best plan that uses only layouts of earlier runs or of the strategies."""
    errors: Mapping[str, float]
    """One standard deviation in seconds of the time of each strategy, and of "found" and "cautious"."""
    comparison: PlanComparison | None
    """The found plan compared with the best fixed strategy."""
    adopted: ExpectedRun
    name: str
    """Name of the adopted plan: found, cautious, or a strategy."""
    reason: str
    finding: BestPlan
    bound: float
    """Lower bound in seconds for any plan, over the searched iterations."""
    searched_seconds: float | None
    """Seconds of the found plan over the searched iterations."""
    left_out: Mapping[str, int]
    """Number of layouts that were left out, by reason."""
    out_of_room: int
    """Number of plans whose stages fit into memory one by one, but not together."""
    memory_unknown: tuple[str, ...]
    """Roles whose memory is not known, which keep the config's layout."""


def search_plan(setting: SearchedRun, *, seed: int = 0, seconds: float = math.inf) -> SearchResult:
    """Find the fastest plan of a run, and decide whether to adopt it instead of a fixed strategy.

    Args:
        seed: seed of the search, and of the draws of prediction errors.
        seconds: time limit, after which the best plan so far is used.

    Raises:
        UserError: a stage has no prediction in any layout, or no plan is possible.
    """
    _require_local_pools(setting)
    fixed, impossible = _fixed(setting)
    short_run = _searched(setting)
    table = PlanTable(short_run)
    _require_known(table)
    finding = explore(table, seed=seed, seconds=0.7 * seconds)
    found = _evaluated(setting, table, finding)
    shapes = {shape for run in fixed.values() for shape in run.shapes.values()}
    narrow = PlanTable(short_run, table.options, shapes)
    cautious = _evaluated(setting, narrow, explore(narrow, seed=seed, seconds=0.3 * seconds))
    if not fixed and found is None:
        raise UserError("\n  ".join(["no plan fits this run:", *dict.fromkeys(impossible.values())]))
    best = min(fixed, key=lambda name: fixed[name].seconds, default=None)
    comparison = compare(found, fixed[best], seed=seed) if found is not None and best is not None else None
    cautious_comparison = (
        compare(cautious, fixed[best], seed=seed) if cautious is not None and best is not None else None
    )
    plans = plans_of(fixed, found, cautious)
    errors = {name: error_of(run, seed=seed) for name, run in plans.items()}
    own = AS_WRITTEN if AS_WRITTEN in fixed else str(setting.config.placement.strategy)
    over_own = compare(fixed[best], fixed[own], seed=seed) if best is not None and own in fixed else None
    name, reason = _choice(best, comparison, cautious_comparison, own, over_own)
    left_out: Counter[str] = sum(table.options.left_out.values(), Counter())
    cost = table.cost(finding.plan) if finding.plan is not None else None
    return SearchResult(
        fixed=fixed,
        impossible=impossible,
        found=found,
        cautious=cautious,
        errors=errors,
        comparison=comparison,
        adopted=plans[name],
        name=name,
        reason=reason,
        finding=finding,
        bound=lower_bound(table),
        searched_seconds=cost[0] if cost is not None else None,
        left_out=dict(left_out.most_common()),
        out_of_room=table.out_of_room,
        memory_unknown=tuple(sorted(table.options.memory_unknown)),
    )


def _evaluated(setting: SearchedRun, table: PlanTable, finding: BestPlan) -> ExpectedRun | None:
    """Evaluate the found plan as a section."""
    if finding.plan is None:
        return None
    plan = finding.plan
    if setting.is_jobs:
        section = jobs_section(plan, table.roles, setting.config.placement, streaming=plan.streaming)
    else:
        section = section_of(plan, table.roles, setting.graph.lag)
    return evaluate(setting, section)


def plans_of(
    fixed: Mapping[str, ExpectedRun], found: ExpectedRun | None, cautious: ExpectedRun | None
) -> dict[str, ExpectedRun]:
    """All possible plans, by name."""
    searched = {FOUND: found, CAUTIOUS: cautious}
    return {**fixed, **{name: run for name, run in searched.items() if run is not None}}


def adopt(result: SearchResult, name: str) -> SearchResult:
    """Adopt the plan of this name, regardless of the search's decision.

    Raises:
        UserError: there is no possible plan of this name.
    """
    plans = plans_of(result.fixed, result.found, result.cautious)
    if name not in plans:
        why = f": {result.impossible[name]}" if name in result.impossible else ""
        raise UserError(f"--take is {name}, which is not a possible plan{why}. Known: {', '.join(plans)}.")
    if name == result.name:
        return result
    reason = f"requested with --take; the search would adopt {result.name}: {result.reason}"
    return replace(result, adopted=plans[name], name=name, reason=reason)


def _require_local_pools(setting: SearchedRun) -> None:
    if setting.is_jobs:
        return
    for name, pool in setting.config.placement.pools.items():
        if pool.partition or pool.nodes:
            raise UserError(
                f"placement.pools.{name} has {'a partition' if pool.partition else 'nodes'} of a scheduler's cluster, "
                "but stages with a model run on this machine too, whose devices are searched. Take the pool out, let "
                "all of these stages run by the scheduler, or give the devices in a cluster file."
            )


def _fixed(setting: SearchedRun) -> tuple[dict[str, ExpectedRun], dict[str, str]]:
    base = setting.config.placement
    strategies = () if setting.is_jobs else STRATEGIES
    sections = {str(strategy): fixed_section(strategy, base) for strategy in strategies}
    written = base.model_copy(update={"expected": None})
    if setting.is_jobs or written.pools or any(entry.pool for entry in written.stages.values()):
        sections[AS_WRITTEN] = written
    fixed, impossible = {}, {}
    for name, section in sections.items():
        try:
            fixed[name] = evaluate(setting, section)
        except ImpossiblePlanError as reason:
            impossible[name] = str(reason)
    return fixed, impossible


def _searched(setting: SearchedRun) -> SearchedRun:
    """Reduce the run to few iterations."""
    iterations = max((node.iteration or 0 for node in setting.graph.nodes.values()), default=0)
    few = HORIZON + setting.graph.lag
    if iterations <= few:
        return setting
    return replace(setting, graph=build_graph(setting.config, few))


def _require_known(table: PlanTable) -> None:
    """Raise UserError if stages have no prediction in any layout."""
    missing = list(table.unknown)
    for role in table.roles:
        devices = table.devices if role.requested is None else role.requested
        everywhere = [table.options.of(role, devices, exclusive) for exclusive in (False, True)]
        alone = table.options.of(role, 1, True) if role.requested is None else []
        if not any(everywhere) and not alone and table.options.without_cost(role):
            missing.append(role.nodes[-1].name)
    if missing:
        raise UserError(
            f"plans cannot be compared: {UnknownCostError(missing)} A stage of unknown cost is not counted as "
            "zero. `pipeline profile CONFIG` runs such stages on a small scale."
        )


def _choice(
    best: str | None,
    comparison: PlanComparison | None,
    cautious_comparison: PlanComparison | None,
    own: str,
    over_own: PlanComparison | None,
) -> tuple[str, str]:
    """The name of the plan to adopt, and the reason.

    Args:
        best: the fastest strategy, if any is possible.
        comparison: the found plan compared with it.
        cautious_comparison: the cautious plan compared with it.
        own: the config's own plan.
        over_own: the fastest strategy compared with the config's own plan, if that is possible.
    """
    if best is None:
        return FOUND, "none of the fixed strategies is possible"
    if comparison is not None and comparison.is_sure:
        return FOUND, f"{_gain_text(comparison, best)}, and is faster {_share_won_text(comparison)}"
    if comparison is None:
        reason = "the search found no plan"
    elif comparison.gain <= 0:
        reason = f"no plan is expected to be faster than {best}"
    else:
        reason = f"the found plan {_uncertain_text(comparison, best)}"
    if cautious_comparison is not None and cautious_comparison.is_sure:
        return (
            CAUTIOUS,
            f"{_gain_text(cautious_comparison, best)}, and is faster {_share_won_text(cautious_comparison)}; {reason}",
        )
    if over_own is None or best == own or over_own.is_sure:
        return best, reason
    if over_own.gain > 0:
        reason += f"; {best} {_uncertain_text(over_own, own)}"
    return own, reason


def _gain_text(comparison: PlanComparison, than: str) -> str:
    gain, error = format_duration(comparison.gain), format_duration(comparison.error)
    return f"it is expected to be {gain} faster than {than}, ± {error}"


def _uncertain_text(comparison: PlanComparison, than: str) -> str:
    gain, error = format_duration(comparison.gain), format_duration(comparison.error)
    return (
        f"is expected to be {gain} faster than {than}, but the predictions may be wrong by ± {error}: it is faster "
        f"{_share_won_text(comparison)}, and {CONFIDENCE:.0%} are required"
    )


def _share_won_text(comparison: PlanComparison) -> str:
    return f"in {comparison.win_share:.0%} of the draws of prediction errors"


def differences(adopted: ExpectedRun, other: ExpectedRun) -> list[str]:
    """The differences between two plans: where each role runs, and in which layout."""
    rows = []
    if adopted.section.streaming != other.section.streaming:
        mine, theirs = (_streaming_text(run.section.streaming) for run in (adopted, other))
        rows.append(f"streaming: {mine} instead of {theirs}")
    before, after = role_placements(other), role_placements(adopted)
    for role, now in after.items():
        if before.get(role) != now:
            rows.append(f"{role}: {now} instead of {before.get(role)}")
    return rows


def _streaming_text(streaming: bool) -> str:
    return "scorers start on finished shards" if streaming else "scorers wait for the whole generation"


def role_placements(run: ExpectedRun) -> dict[str, str]:
    """By role with devices, where its stages run, and in which layout."""
    found = {}
    for node in run.simulation.order:
        if not node.stage.uses_devices(node.config) or node.placement is None:
            continue
        if node.placement.executor in LOCAL_KINDS:
            found[node.role] = f"{_devices(node.placement.devices, run)}{_layout(node)}"
        else:
            found[node.role] = f"{node.placement.executor}{_layout(node)}"
    return found


def _devices(devices: tuple[int, ...], run: ExpectedRun) -> str:
    cluster = run.simulation.cluster
    if not cluster.is_divided:
        return f"all {plural(cluster.devices, cluster.unit)}"
    if len(devices) == 1:
        return f"{cluster.unit} {devices[0]}"
    return f"{cluster.unit}s {devices[0]}-{devices[-1]}"


def _layout(node: Node) -> str:
    config, stage = node.config, node.stage
    layout = stage.layout(config)
    parts = [layout.shown or (f"replicas={layout.processes}" if layout.processes > 1 else "")]
    parts += [
        f"{key}={value}"
        for key in ("micro_batch_tokens", "gradient_checkpointing")
        if key in stage.layout_keys and (value := getattr(config, key)) != type(config).model_fields[key].default
    ]
    shown = " ".join(filter(None, parts))
    return f", {shown}" if shown else ""
