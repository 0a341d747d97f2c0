"""Presents a simulated run: as a table with a timeline, in sentences, and as JSON."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.config.cluster import MachinesSection
from pipelines.config.run import RunConfig
from pipelines.graph import Graph
from pipelines.insight.plan import PlannedStage, PlanView, plan_of, runs_on, timeline
from pipelines.planning.cluster import Cluster
from pipelines.planning.draws import TAIL_SHARE, Draws
from pipelines.planning.memory import format_bytes
from pipelines.planning.prediction import Basis, Prediction
from pipelines.planning.simulation import DriverCosts, Simulation, describe_unknown, sensitivities
from pipelines.text import echo, format_duration, format_ranges, plural

MAX_NAMED = 3
"""Maximum number of items listed in a sentence."""
MIN_GAIN = 0.005
"""Share of the run's time below which a gain is not mentioned."""
BASES: dict[Basis, str] = {
    "measured": "runs of similar stages",
    "scaled": "runs of other sizes or layouts",
    "analytic": "data sheets alone",
}


@dataclass(frozen=True)
class SimulationView:
    """The results of a simulated run. Times are in seconds."""

    machines: str
    """Description of the machines that it runs on."""
    plan: PlanView
    total: float
    is_bound: bool
    """Whether `total` is a lower bound, because the durations of the stages in `unknown` are not known."""
    unknown: list[str]
    iterations: list[float]
    """Time from each policy to the next."""
    held: float
    """Device-hours that are assigned to stages."""
    computing: float
    """Device-hours in which stages compute."""
    owned: float
    """Device-hours of all devices until the end of the run."""
    currency: str
    cost: float | None
    """Cost of all devices until the end; None where the cluster's file has no price."""
    cost_held: float | None
    """Cost of the device-hours in `held` alone."""
    way: dict[str, float]
    """By kind of stage, its share of the critical path, on which each stage starts when the one before ends."""
    gains: dict[str, float]
    """By kind of stage, the share of the run's time that is saved if its stages take a tenth less."""
    memory: int | None
    """Bytes on the fullest device; None where that is not known."""
    memory_room: int | None
    memory_stage: str
    predictions: dict[str, Prediction]
    """The predicted duration of each stage, with the basis of the prediction."""
    known_by: dict[str, float]
    """Share of the stages' time by the basis of its prediction."""
    unused: dict[str, tuple[int, int]]
    """By role, for stages with more GPUs than their processes use: (GPUs assigned, GPUs used)."""
    driver: DriverCosts | None
    """The measured time of the driver between stages; None: no run here has measured it, and it is left out."""
    draws: Draws | None
    seed: int
    finishes: bool
    """Whether most of the drawn runs finish; true where none was drawn."""


def view_simulation(
    simulation: Simulation,
    graph: Graph,
    config: RunConfig,
    *,
    machines: MachinesSection | None = None,
    room: int | None = None,
    driver: DriverCosts | None = None,
    draws: Draws | None = None,
    seed: int = 0,
) -> SimulationView:
    """Collect the results of a simulated run.

    Args:
        simulation: the simulated run.
        graph: its placed stages.
        config: its config.
        machines: the machines that it runs on; None: this machine.
        room: bytes of memory of one device.
        driver: the driver's own time that was assumed.
        draws: random draws of the same run.
        seed: the seed of the draws.
    """
    times = {name: (one.start, one.end) for name, one in simulation.times.items()}
    seconds = {name: one.seconds for name, one in simulation.predictions.items()}
    seconds |= dict.fromkeys(simulation.unknown, 0.0)
    roles = {node.role for node in simulation.order if node.name in simulation.predictions}
    cluster = simulation.cluster
    hours = {
        "held": simulation.held_seconds / 3600,
        "computing": simulation.computing_seconds / 3600,
        "owned": simulation.owned_seconds / 3600,
    }
    price = machines.price if machines is not None else None
    peak, stage = max(simulation.memory.values(), default=(None, ""))
    whole = sum(simulation.path_by_kind.values())
    plan = plan_of(graph, config, cluster, seconds, roles, times)
    pools = [replace(pool, idle=simulation.idle.get(pool.name, pool.idle)) for pool in plan.pools]
    return SimulationView(
        machines=_describe_machines(cluster, machines),
        plan=replace(plan, pools=pools),
        total=simulation.total,
        is_bound=bool(simulation.unknown),
        unknown=list(simulation.unknown),
        iterations=simulation.iterations,
        **hours,
        currency=machines.currency if machines is not None else "",
        cost=None if price is None else price * hours["owned"],
        cost_held=None if price is None else price * hours["held"],
        way={kind: time / whole for kind, time in simulation.path_by_kind.items()} if whole else {},
        gains=sensitivities(simulation),
        memory=peak,
        memory_room=room,
        memory_stage=stage,
        predictions=dict(simulation.predictions),
        known_by=_known_by(simulation),
        unused=_unused(simulation),
        driver=driver,
        draws=draws,
        seed=seed,
        finishes=draws is None or draws.finishes,
    )


def _describe_machines(cluster: Cluster, machines: MachinesSection | None) -> str:
    if machines is None:
        return f"this machine: {plural(cluster.devices, cluster.unit)}"
    each = f" in {machines.machines} machines" if machines.machines > 1 else ""
    return f"{plural(machines.total, 'GPU')} {machines.gpu}{each}"


def _known_by(simulation: Simulation) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in simulation.predictions.values():
        found[one.basis] = found.get(one.basis, 0.0) + one.seconds
    whole = sum(found.values())
    return {basis: time / whole for basis, time in found.items()} if whole else {}


def _unused(simulation: Simulation) -> dict[str, tuple[int, int]]:
    if not simulation.cluster.gpus:
        return {}
    found = {}
    for node in simulation.order:
        used = node.stage.layout(node.config).processes * max(1, node.gpus)
        if (had := simulation.devices_of(node)) > used:
            found[node.role] = (had, used)
    return found


def print_simulation(console: Console, view: SimulationView) -> None:
    """Print the results as a table, a timeline and sentences."""
    plan = view.plan
    also = f"{', streaming' if plan.streaming else ''}{f', lag {plan.lag}' if plan.lag else ''}"
    echo(console, f"strategy {plan.strategy}{also}; {view.machines}")
    table = Table("stage", "iterations", "runs on", "layout", "takes", "memory of a device", "known by")
    for row in _rows(view):
        table.add_row(*row)
    console.print(table)
    echo(console, *timeline(plan, end=format_duration(view.total), room=console.width), "", *in_sentences(view))


def _rows(view: SimulationView) -> Iterable[tuple[str, ...]]:
    """Rows of the table: one for all stages of a role with the same placement and layout."""
    groups: dict[tuple[str, str, str], list[PlannedStage]] = {}
    for stage in view.plan.stages:
        groups.setdefault((stage.role, runs_on(stage, view.plan), stage.layout), []).append(stage)
    for (role, place, layout), members in groups.items():
        iterations = format_ranges(stage.iteration for stage in members if stage.iteration is not None)
        known = [one for stage in members if (one := view.predictions.get(stage.stage)) is not None]
        if len(known) < len(members):
            yield role, iterations, place, layout, "unknown", "", ""
            continue
        took = sorted(one.seconds for one in known)
        peaks = [one.memory for one in known if one.memory is not None]
        yield (
            role,
            iterations,
            place,
            layout,
            " to ".join(dict.fromkeys((format_duration(took[0]), format_duration(took[-1])))),
            format_bytes(max(peaks)) if peaks else "",
            ", ".join(dict.fromkeys(one.basis for one in known)),
        )


def in_sentences(view: SimulationView) -> Iterable[str]:
    """The results in sentences."""
    if view.is_bound:
        yield f"All times are lower bounds: {describe_unknown(view.unknown)}"
    least = "at least " if view.is_bound else ""
    each = ", ".join(format_duration(seconds) for seconds in view.iterations[:MAX_NAMED])
    more = f" and {len(view.iterations) - MAX_NAMED} more" if len(view.iterations) > MAX_NAMED else ""
    draws = view.draws
    if draws is not None and not view.finishes:
        yield (
            f"THIS RUN IS NOT EXPECTED TO FINISH: of {len(draws.totals)} runs drawn (seed {view.seed}) "
            f"{draws.stopped:.0%} stop, because a stage fails more often than it is retried. Use fewer devices "
            "per stage, smaller units of work (generation.shard_size, training.checkpoint_seconds), or more "
            "executor.retries. "
            "The following figures assume that nothing fails"
        )
    yield f"{least}{format_duration(view.total)} in all" + (f"; from policy to policy {each}{more}" if each else "")
    if draws is not None and view.finishes:
        low, high = draws.interval
        times = len(draws.totals)
        yield (
            f"of {times} runs drawn (seed {view.seed}) the median takes {least}{format_duration(draws.median)}, and "
            f"{1 - 2 * TAIL_SHARE:.0%} of them {least}{format_duration(low)} to {format_duration(high)}; "
            f"in a run {draws.failures:.2g} attempts fail"
            + (f", and {draws.stopped:.0%} stop because a stage fails too often" if draws.stopped else "")
        )
    yield (
        f"device-hours: {least}{view.owned:.4g} of all devices, {view.held:.4g} assigned to stages, "
        f"{view.computing:.4g} in which they compute"
    )
    if view.cost is not None and view.cost_held is not None:
        yield (
            f"cost: {least}{view.cost:,.2f} {view.currency} for all devices until the end, "
            f"{view.cost_held:,.2f} {view.currency} for the hours assigned to stages"
        )
    yield from _bottleneck(view)
    yield from _memory(view)
    for pool in view.plan.pools:
        name = f"pool {pool.name}" if pool.name else "all devices"
        yield f"{name} ({format_ranges(pool.devices)}): idle {pool.idle:.0%}"
    for role, (had, used) in view.unused.items():
        yield f"{role} has {had} GPUs and uses {used} of them: its processes are fewer. Set its layout, or its dp"
    known = sorted(view.known_by.items(), key=lambda item: -item[1])
    yield "durations are known from " + ", ".join(f"{BASES[basis]} ({share:.0%})" for basis, share in known)  # type: ignore[index]
    if view.driver is None:
        yield "the driver's own time between stages is left out: no run on this machine has measured it"


def _bottleneck(view: SimulationView) -> Iterable[str]:
    """The kinds of stages on the critical path, and the time that faster ones would save."""
    if not view.way:
        return
    first = next(iter(view.way))
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in list(view.way.items())[:MAX_NAMED])
    worth = [(kind, gain) for kind, gain in view.gains.items() if gain >= MIN_GAIN][:MAX_NAMED]
    saved = ", ".join(f"{kind} {gain:.1%}" for kind, gain in worth)
    yield f"bottleneck: {first}. Shares of the critical path: {shares}. Saved if each took a tenth less: {saved}"


def _memory(view: SimulationView) -> Iterable[str]:
    if view.memory is None:
        yield "memory: not known"
        return
    of = f" of {format_bytes(view.memory_room)}" if view.memory_room is not None else ""
    yield f"memory: {format_bytes(view.memory)}{of} on the fullest device, in {view.memory_stage}"


def as_json(view: SimulationView) -> str:
    """The results as one JSON object."""
    data: dict[str, Any] = asdict(view)
    if view.draws is not None:
        low, high = view.draws.interval
        found = {"median": view.draws.median, "low": low, "high": high}
        data["draws"] |= found if view.finishes else dict.fromkeys(found)
    return json.dumps(data, indent=1)
