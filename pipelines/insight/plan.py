"""`pipeline plan show`: shows where and when each stage of a run will run.

Durations are taken from the run's own earlier stages. Start times follow from the rule by which the driver starts
stages (pipelines/planning/scheduling.py).
"""

import itertools
import json
import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.config.executor import LOCAL_KINDS
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Node
from pipelines.insight.remaining_time import seconds_by_role
from pipelines.planning.cluster import Cluster, configured_cluster
from pipelines.planning.entries import check_entries
from pipelines.planning.memory import device_of, estimate_memory, format_bytes, require_memory
from pipelines.planning.preflight import require_possible
from pipelines.planning.scheduling import critical_path, schedule, shortest_time, start_order, streams
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event
from pipelines.text import echo, format_ranges

WIDTH, MIN_WIDTH = 100, 16
"""Characters of the timeline, by default and at least, on a narrow terminal."""
UNIT = 1.0
"""Duration of a stage with a model where no duration is known; other stages then take no time."""
NO_DEVICE = "no device"
"""The lane of stages without devices."""


@dataclass(frozen=True)
class PlannedStage:
    """Place and time of one stage."""

    stage: str
    role: str
    iteration: int | None
    workload: str
    executor: str
    pool: str
    devices: list[int] | None
    """Its exclusive devices on this machine; None: it shares all of them, or a scheduler assigns them."""
    layout: str
    start: float
    end: float
    measured: bool
    """Whether its duration is that of earlier stages of its role."""
    critical: bool


@dataclass(frozen=True)
class PlannedPool:
    """A pool of devices, and how busy it is."""

    name: str
    devices: list[int]
    idle: float
    """Share of the run's time in which the devices are idle."""


@dataclass(frozen=True)
class PlanView:
    """A run's plan."""

    strategy: str
    streaming: bool
    lag: int
    unit: str
    """seconds, or units where no duration is known."""
    devices: str
    """The devices of this machine, or of the one that the config describes."""
    total: float
    shortest: float
    """Lower bound on the duration of these stages in any order."""
    alone: float
    """Duration of all stages one after another."""
    critical: list[str]
    pools: list[PlannedPool]
    stages: list[PlannedStage]


def view_plan(graph: Graph, config: RunConfig, cluster: Cluster, events: list[Event]) -> PlanView:
    """The plan of a placed graph, with durations from the run's events.

    Args:
        graph: the placed graph.
        config: the run's config.
        cluster: the devices that it is placed on.
        events: the events of the run so far.
    """
    seconds, measured = durations(graph, events)
    followers = streams(graph, config)
    times = schedule(start_order(graph, config), cluster, seconds, streams=followers)
    return plan_of(graph, config, cluster, seconds, measured, times)


def plan_of(
    graph: Graph,
    config: RunConfig,
    cluster: Cluster,
    seconds: Mapping[str, float],
    measured: Collection[str],
    times: Mapping[str, tuple[float, float]],
) -> PlanView:
    """The plan of a placed graph with given durations and times.

    Args:
        graph: the placed graph.
        config: the run's config.
        cluster: the devices that it is placed on.
        seconds: duration of each stage.
        measured: the roles with measured durations; if there are none, `seconds` are units.
        times: (start, end) of each stage.
    """
    followers = streams(graph, config)
    path = critical_path(graph.nodes.values(), seconds, followers)
    stages = [_planned(node, times[node.name], measured, set(path), cluster) for node in graph.nodes.values()]
    total = max((end for _, end in times.values()), default=0.0)
    return PlanView(
        strategy=config.placement.strategy,
        streaming=config.placement.streaming,
        lag=config.lag,
        unit="seconds" if measured else "units",
        devices=f"{cluster.devices} {cluster.unit}{'s' * (cluster.devices != 1)}",
        total=total,
        shortest=shortest_time(graph.nodes.values(), seconds, followers),
        alone=sum(seconds.values()),
        critical=path,
        pools=_pools([one for one in stages if _has_devices(graph.nodes[one.stage])], total, cluster),
        stages=stages,
    )


def durations(graph: Graph, events: list[Event]) -> tuple[dict[str, float], set[str]]:
    """The expected duration of each stage, and the roles with measured durations.

    A stage of another role is expected to take as long as other stages of its kind or, if there are none, as the median
    of all roles. Where nothing has been measured, every stage with a model takes one unit.
    """
    known = seconds_by_role(graph, events)
    if not known:
        return {name: UNIT * node.stage.uses_devices(node.config) for name, node in graph.nodes.items()}, set()
    by_stage: dict[str, list[float]] = {}
    for node in graph.nodes.values():
        if node.role in known:
            by_stage.setdefault(node.stage.name, []).append(known[node.role])
    usual = statistics.median(known.values())
    found = {}
    for name, node in graph.nodes.items():
        alike = by_stage.get(node.stage.name)
        found[name] = known.get(node.role, statistics.median(alike) if alike else usual)
    return found, set(known)


def _planned(
    node: Node, times: tuple[float, float], measured: Collection[str], critical: set[str], cluster: Cluster
) -> PlannedStage:
    placement = node.placement
    assert placement is not None
    layout = node.stage.layout(node.config)
    shown = layout.shown or (f"replicas={layout.processes}" if layout.processes > 1 else "")
    return PlannedStage(
        stage=node.name,
        role=node.role,
        iteration=node.iteration,
        workload=node.workload,
        executor=placement.executor,
        pool=placement.pool,
        devices=list(placement.devices) if placement.exclusive else None,
        layout=shown,
        start=times[0],
        end=times[1],
        measured=node.role in measured,
        critical=node.name in critical,
    )


def _has_devices(node: Node) -> bool:
    return node.stage.uses_devices(node.config)


def _pools(stages: list[PlannedStage], total: float, cluster: Cluster) -> list[PlannedPool]:
    """The pools of this machine, or one of all its devices. `stages` are those that use devices."""
    groups: dict[str, list[PlannedStage]] = {}
    for stage in stages:
        if stage.executor in LOCAL_KINDS and stage.devices != []:
            groups.setdefault(stage.pool, []).append(stage)
    found = []
    for name, members in groups.items():
        if cluster.is_divided:
            devices = sorted({device for stage in members for device in stage.devices or ()})
            work = sum((stage.end - stage.start) * len(stage.devices or ()) for stage in members)
            room = len(devices) * total
        else:
            devices = list(range(cluster.gpus or cluster.cores))
            work, room = sum(stage.end - stage.start for stage in members), cluster.parallel * total
        found.append(PlannedPool(name, devices, max(0.0, 1 - work / room) if room else 0.0))
    return found


def print_plan(console: Console, view: PlanView) -> None:
    """Print the plan as a table and a timeline, with the critical path and the idle shares of pools."""
    lag = f", lag {view.lag}" if view.lag else ""
    also = f"{', streaming' if view.streaming else ''}{lag}"
    echo(console, f"strategy {view.strategy}{also}; {view.devices}")
    table = Table("stage", "iterations", "runs on", "layout", view.unit)
    for row in _rows(view):
        table.add_row(*row)
    console.print(table)
    echo(console, *timeline(view, room=console.width), "")
    no_less = f"no order of these stages takes less than {view.shortest:.4g}"
    echo(console, f"{view.total:.4g} {view.unit} in all; {no_less}, and one after another they take {view.alone:.4g}.")
    echo(console, "critical path:", *_by_iteration(view))
    for pool in view.pools:
        echo(
            console,
            f"{f'pool {pool.name}' if pool.name else 'all devices'} ({format_ranges(pool.devices)}): "
            f"idle {pool.idle:.0%}",
        )
    if view.unit == "units":
        echo(console, "No durations are known yet: each stage with a model counts as one unit, the others as none.")
    elif unseen := sorted({stage.role for stage in view.stages if not stage.measured}):
        echo(console, f"not measured yet, and expected to take as long as others of their kind: {', '.join(unseen)}")


def _rows(view: PlanView) -> Iterator[tuple[str, str, str, str, str]]:
    """Rows of the table: one for all stages of a role with the same placement and layout."""
    groups: dict[tuple[str, str, str], list[PlannedStage]] = {}
    for stage in view.stages:
        groups.setdefault((stage.role, runs_on(stage, view), stage.layout), []).append(stage)
    for (role, where, layout), members in groups.items():
        iterations = [stage.iteration for stage in members if stage.iteration is not None]
        times = sorted({round(stage.end - stage.start, 1) for stage in members})
        shown = " to ".join(f"{time:g}" for time in dict.fromkeys((times[0], times[-1])))
        yield role, format_ranges(iterations), where, layout, shown


def _by_iteration(view: PlanView) -> Iterator[str]:
    """The critical path, a line for each iteration."""
    stages = {stage.stage: stage for stage in view.stages}
    for iteration, names in itertools.groupby(view.critical, lambda name: stages[name].iteration):
        where = "before" if iteration is None else f"iteration {iteration}"
        yield f"  {where}: {', '.join(stages[name].role for name in names)}"


def runs_on(stage: PlannedStage, view: PlanView) -> str:
    """The executor, pool and devices of a stage, in words."""
    pool = f" {stage.pool}" if stage.pool else ""
    if stage.executor not in LOCAL_KINDS:
        return f"{stage.executor}{pool}"
    if stage.devices is None:
        return f"all of {view.devices}"
    return (
        f"{stage.executor}{pool}: {format_ranges(stage.devices)}" if stage.devices else f"{stage.executor}: {NO_DEVICE}"
    )


def timeline(view: PlanView, width: int = WIDTH, end: str = "", room: int | None = None) -> list[str]:
    """The timeline as text: a line for each device, or for devices with the same stages.

    Args:
        end: label of the right end; by default the total time in the plan's unit.
        room: width of the terminal in characters, which labels and timeline have to fit into.
    """
    if not view.total:
        return []
    lanes = lanes_of(view)
    margin = max(map(len, lanes))
    width = width if room is None else max(MIN_WIDTH, min(width, room - margin - 2))
    marks = f"0{end or f'{view.total:.4g} {view.unit}':>{width - 1}}"
    return [f"{'':<{margin}}  {marks}"] + [
        f"{label:<{margin}}  {_draw_lane(stages, view.total, width)}" for label, stages in lanes.items()
    ]


def lanes_of(view: PlanView) -> dict[str, list[PlannedStage]]:
    """The stages of each device, or of devices with the same stages, by label and in the order of their start."""
    timed = [stage for stage in view.stages if stage.end > stage.start]
    by_device: dict[int, list[PlannedStage]] = {}
    shared: dict[str, list[list[PlannedStage]]] = {}
    for stage in sorted(timed, key=lambda stage: stage.start):
        if stage.executor in LOCAL_KINDS and stage.devices:
            for device in stage.devices:
                by_device.setdefault(device, []).append(stage)
            continue
        name = (
            stage.executor if stage.executor not in LOCAL_KINDS else NO_DEVICE if stage.devices == [] else "all devices"
        )
        rows = shared.setdefault(f"{name} {stage.pool}".strip(), [])
        row = next((row for row in rows if row[-1].end <= stage.start), None)
        if row is None:
            rows.append([stage])
        else:
            row.append(stage)
    alike: dict[tuple[str, ...], list[int]] = {}
    for device in sorted(by_device):
        alike.setdefault(tuple(stage.stage for stage in by_device[device]), []).append(device)
    unit = view.devices.split()[-1].removesuffix("s")
    lanes = {f"{unit} {format_ranges(devices)}": by_device[devices[0]] for devices in alike.values()}
    for name, rows in shared.items():
        lanes |= {name if number == 0 else f"{name} ({number + 1})": row for number, row in enumerate(rows)}
    return lanes


def _draw_lane(stages: list[PlannedStage], total: float, width: int) -> str:
    line = ["."] * width
    for stage in stages:
        begin = min(width - 1, round(stage.start / total * width))
        end = max(begin + 1, round(stage.end / total * width))
        label = stage.role.rpartition("/")[2] if stage.iteration is None else f"{stage.iteration} {stage.role}"
        room = end - begin
        line[begin:end] = f"[{label[: room - 2]:=<{room - 2}}]" if room > 2 else "[" + "]" * (room - 1)
    return "".join(line).rstrip()


def as_json(view: PlanView) -> str:
    """The plan as one JSON object."""
    data: dict[str, Any] = asdict(view)
    return json.dumps(data, indent=1)


def check_plan(graph: Graph, config: RunConfig) -> list[str]:
    """Check that a plan is possible. Returns a line for each check that has passed.

    Raises:
        UserError: the plan asks for more devices or memory than there are, for a layout that a model does not support,
            or for a file that does not exist.
    """
    check_entries(graph, config)
    cluster = configured_cluster(config)
    require_possible(graph, cluster)
    device = device_of(config)
    needs, unknown = estimate_memory(graph, on_gpu=device.gpus > 0)
    require_memory(graph, config, device, needs)
    lines = [f"{len(graph.nodes)} stages have their devices, by placement.strategy={config.placement.strategy}"]
    lines.append("the models support their layouts")
    if needs:
        largest = max(needs, key=lambda name: needs[name].total)
        lines.append(f"memory: {largest} takes most, {format_bytes(needs[largest].total)}, estimated for {device.name}")
    if unknown:
        lines.append(f"not known: the memory of {', '.join(sorted(unknown)[:3])}{' and others' * (len(unknown) > 3)}")
    return lines


def events_of(config: RunConfig) -> list[Event]:
    """The events of the run that a config describes; none where it has not been started."""
    return RunDirectory(config.run_directory).events() if config.run_directory.is_dir() else []
