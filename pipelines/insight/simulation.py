"""What there is to say of a simulated run: in words, with a timeline, and as data."""

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
from pipelines.planning.draws import OUTSIDE, Draws
from pipelines.planning.memory import size
from pipelines.planning.prediction import Basis, Prediction
from pipelines.planning.simulation import DriverCosts, Simulation, gains, unknown_in_words
from pipelines.text import lasting, numbers, plural, say

NAMED = 3
"""Kinds of stages that a sentence names."""
WORTH_SAYING = 0.005
"""Share of the run's time below which a gain is none."""
BASES: dict[Basis, str] = {
    "measured": "runs of stages alike",
    "scaled": "runs of other sizes or layouts",
    "analytic": "data sheets alone",
}


@dataclass(frozen=True)
class SimulationView:
    """A simulated run. Times are seconds."""

    machines: str
    """What it runs on."""
    plan: PlanView
    total: float
    is_bound: bool
    """Whether it takes at least so long, because nothing is known of the stages in `unknown`."""
    unknown: list[str]
    iterations: list[float]
    """From one policy to the next."""
    held: float
    """Device-hours in which stages have devices, and: """
    computing: float
    """in which they compute, and:"""
    owned: float
    """of all devices until the end."""
    currency: str
    cost: float | None
    """Of all devices until the end; None: the cluster's file has no price."""
    cost_held: float | None
    """Of those that stages have, where only these are paid for."""
    way: dict[str, float]
    """Share of the way to the end, on which each stage begins when the one before has ended, by kind of stage."""
    gains: dict[str, float]
    """Share of the run's time that is spared where the stages of a kind take a tenth less."""
    memory: int | None
    """Bytes on the fullest device; None where that is not known."""
    memory_room: int | None
    memory_stage: str
    predictions: dict[str, Prediction]
    """What each stage is expected to take, and what that is known from."""
    known_by: dict[str, float]
    """Share of the stages' time by what it is known from."""
    unused: dict[str, tuple[int, int]]
    """By role of stages that have more GPUs than processes for them: these GPUs, and those that they use."""
    driver: DriverCosts | None
    """What the driver takes between stages, as measured; None: no run here says, and it is left out."""
    draws: Draws | None
    seed: int
    finishes: bool
    """Whether most of the runs drawn come to their end by themselves; so it is where none is drawn."""


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
    """What there is to say of a simulated run.

    Args:
        simulation: of it.
        graph: its stages, placed.
        config: the run's.
        machines: what it runs on; None: this machine.
        room: bytes of memory of one device.
        driver: what its own time was taken to be.
        draws: of the same run.
        seed: of these.
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
        machines=_machines(cluster, machines),
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
        gains=gains(simulation),
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


def _machines(cluster: Cluster, machines: MachinesSection | None) -> str:
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
    """It as a table, a timeline and in words."""
    plan = view.plan
    also = f"{', streaming' if plan.streaming else ''}{f', lag {plan.lag}' if plan.lag else ''}"
    say(console, f"strategy {plan.strategy}{also}; {view.machines}")
    table = Table("stage", "iterations", "runs on", "layout", "takes", "memory of a device", "known by")
    for row in _rows(view):
        table.add_row(*row)
    console.print(table)
    say(console, *timeline(plan, end=lasting(view.total), room=console.width), "", *in_sentences(view))


def _rows(view: SimulationView) -> Iterable[tuple[str, ...]]:
    """One for the stages of a role that run alike."""
    groups: dict[tuple[str, str, str], list[PlannedStage]] = {}
    for stage in view.plan.stages:
        groups.setdefault((stage.role, runs_on(stage, view.plan), stage.layout), []).append(stage)
    for (role, place, layout), members in groups.items():
        iterations = numbers(stage.iteration for stage in members if stage.iteration is not None)
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
            " to ".join(dict.fromkeys((lasting(took[0]), lasting(took[-1])))),
            size(max(peaks)) if peaks else "",
            ", ".join(dict.fromkeys(one.basis for one in known)),
        )


def in_sentences(view: SimulationView) -> Iterable[str]:
    """What it comes to."""
    if view.is_bound:
        yield f"All of it is a bound from below: {unknown_in_words(view.unknown)}"
    least = "at least " if view.is_bound else ""
    each = ", ".join(lasting(seconds) for seconds in view.iterations[:NAMED])
    more = f" and {len(view.iterations) - NAMED} more" if len(view.iterations) > NAMED else ""
    draws = view.draws
    if draws is not None and not view.finishes:
        yield (
            f"THIS RUN IS NOT EXPECTED TO FINISH: of {len(draws.totals)} runs drawn (seed {view.seed}) "
            f"{draws.stopped:.0%} stop, because a stage fails more often than it is tried again. Give its stages fewer "
            "devices, shorter ones (generation.shard_size, training.checkpoint_seconds), or more executor.retries. "
            "What follows is as if nothing failed"
        )
    yield f"{least}{lasting(view.total)} in all" + (f"; from policy to policy {each}{more}" if each else "")
    if draws is not None and view.finishes:
        low, high = draws.interval
        times = len(draws.totals)
        yield (
            f"of {times} runs drawn (seed {view.seed}) the median takes {least}{lasting(draws.median)}, and "
            f"{1 - 2 * OUTSIDE:.0%} of them {least}{lasting(low)} to {lasting(high)}; in a run {draws.failures:.2g} "
            "attempts fail"
            + (f", and {draws.stopped:.0%} stop because a stage fails too often" if draws.stopped else "")
        )
    yield (
        f"device-hours: {least}{view.owned:.4g} of all devices, {view.held:.4g} that stages have, "
        f"{view.computing:.4g} in which they compute"
    )
    if view.cost is not None and view.cost_held is not None:
        yield (
            f"cost: {least}{view.cost:,.2f} {view.currency} for all devices until the end, "
            f"{view.cost_held:,.2f} {view.currency} for those that stages have"
        )
    yield from _bottleneck(view)
    yield from _memory(view)
    for pool in view.plan.pools:
        name = f"pool {pool.name}" if pool.name else "all devices"
        yield f"{name} ({numbers(pool.devices)}): idle {pool.idle:.0%}"
    for role, (had, used) in view.unused.items():
        yield f"{role} has {had} GPUs and uses {used} of them: its processes are fewer. Set its layout, or its dp"
    known = sorted(view.known_by.items(), key=lambda item: -item[1])
    yield "what stages take is known from " + ", ".join(f"{BASES[basis]} ({share:.0%})" for basis, share in known)  # type: ignore[index]
    if view.driver is None:
        yield "what the driver takes between stages is left out: no run on this machine says"


def _bottleneck(view: SimulationView) -> Iterable[str]:
    """On which stages the run waits."""
    if not view.way:
        return
    first = next(iter(view.way))
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in list(view.way.items())[:NAMED])
    worth = [(kind, gain) for kind, gain in view.gains.items() if gain >= WORTH_SAYING][:NAMED]
    spared = ", ".join(f"{kind} {gain:.1%}" for kind, gain in worth)
    yield f"bottleneck: {first}. Of the way to the end: {shares}. What a tenth less of each would spare: {spared}"


def _memory(view: SimulationView) -> Iterable[str]:
    if view.memory is None:
        yield "memory: not known"
        return
    of = f" of {size(view.memory_room)}" if view.memory_room is not None else ""
    yield f"memory: {size(view.memory)}{of} on the fullest device, in {view.memory_stage}"


def as_json(view: SimulationView) -> str:
    """The same as one JSON object."""
    data: dict[str, Any] = asdict(view)
    if view.draws is not None:
        low, high = view.draws.interval
        found = {"median": view.draws.median, "low": low, "high": high}
        data["draws"] |= found if view.finishes else dict.fromkeys(found)
    return json.dumps(data, indent=1)
