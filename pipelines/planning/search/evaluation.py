"""Evaluates plans: places and simulates them, or reports why they are impossible.

`evaluate` places and simulates the section of a plan as the driver would run it. `PlanTable` evaluates thousands of
plans during the search, from a table of each stage's layouts; the plan that is found is evaluated by `evaluate` again.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from contracts.errors import UserError
from pipelines.config.executor import LOCAL_KINDS
from pipelines.config.placement import PlacementSection
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Node, Placement
from pipelines.planning.cluster import Cluster
from pipelines.planning.estimates import memory
from pipelines.planning.memory import Device, format_bytes
from pipelines.planning.placement import configured_sizes, place, place_stage
from pipelines.planning.prediction import Prediction, Predictor
from pipelines.planning.preflight import device_mistakes, layout_requirements
from pipelines.planning.scheduling import Streams, start_order, streams
from pipelines.planning.search.layouts import (
    LayoutOption,
    LayoutOptions,
    RoleStages,
    local_roles,
    needed_memory,
    scheduler_roles,
)
from pipelines.planning.search.plans import WHOLE, PlanChoice, pool_devices
from pipelines.planning.simulation import (
    DriverCosts,
    ScheduleConditions,
    Simulation,
    contention,
    describe_unknown,
    simulate,
)
from pipelines.planning.strategies import placements

QUEUE = "queue"
"""The key of a scheduler's queue among the shapes whose errors are drawn."""


@dataclass(frozen=True)
class SearchedRun:
    """The run that plans are searched for."""

    config: RunConfig
    graph: Graph
    """Its graph, not placed."""
    predictor: Predictor
    device: Device
    """The device whose memory limits the stages."""
    cluster_of: Callable[[RunConfig], Cluster]
    """The cluster of the run, by its config."""
    threads: int = 1
    """Threads of each process, on a machine without GPUs."""
    driver: DriverCosts = field(default=DriverCosts())
    detached: bool = False
    """Whether the run is detached: jobs are submitted all at once, and there is no driver."""

    @functools.cached_property
    def is_jobs(self) -> bool:
        """Whether every stage that uses devices runs as a scheduler's jobs, so that plans assign no devices."""
        heavy = [node for node in self.graph.nodes.values() if node.stage.uses_devices(node.config)]
        return bool(heavy) and not any(self.config.executor.entry(node).kind in LOCAL_KINDS for node in heavy)

    @functools.cached_property
    def on_gpu(self) -> bool:
        """Whether the devices are GPUs."""
        cluster = self.cluster_of(self.config)
        if not self.is_jobs:
            return cluster.gpus > 0
        return cluster.scheduler_has_gpus and self.config.executor.requests_gpus

    def with_section(self, section: PlacementSection) -> RunConfig:
        """Copy the config with another plan."""
        return self.config.model_copy(update={"placement": section})

    @functools.cached_property
    def streams(self) -> Streams:
        """The stages that stream from others in plans with streaming."""
        section = self.config.placement.model_copy(update={"streaming": True})
        return streams(self.graph, self.with_section(section))

    @functools.cached_property
    def _unrelated(self) -> dict[str, set[str]]:
        """By stage, the stages that neither depend on it nor it on them."""
        before: dict[str, set[str]] = {}
        for node in self.graph.nodes.values():
            needs = [need for need in node.needs if need in before]
            before[node.name] = set(needs).union(*(before[need] for need in needs))
        names = list(before)
        return {
            name: {
                other for other in names if other != name and other not in before[name] and name not in before[other]
            }
            for name in names
        }

    def concurrent_stages(self, *, streaming: bool) -> Mapping[str, set[str]]:
        """By stage, the stages that can run at the same time: independent ones, and with streaming also its
        followers."""
        return self._following if streaming else self._unrelated

    @functools.cached_property
    def _following(self) -> dict[str, set[str]]:
        found = {name: set(others) for name, others in self._unrelated.items()}
        for follower, (producer, _) in self.streams.items():
            found[follower].add(producer)
            found[producer].add(follower)
        return found


@dataclass(frozen=True)
class ExpectedRun:
    """A possible plan with its simulation."""

    section: PlacementSection
    simulation: Simulation
    shapes: Mapping[str, str]
    """By stage, its role and layout (`shape_of`), which share one prediction error."""
    largest: int = 0
    """The largest memory of a stage on one device, in bytes, if stages are a scheduler's jobs."""

    @property
    def seconds(self) -> float:
        """Expected seconds of the run."""
        return self.simulation.total

    @property
    def device_hours(self) -> float:
        """Device-hours that stages hold."""
        return self.simulation.held_seconds / 3600

    @property
    def memory(self) -> int:
        """Predicted bytes on the fullest device."""
        return max((peak for peak, _ in self.simulation.memory.values()), default=self.largest)

    @property
    def idle(self) -> float:
        """The share of device time in which devices are idle."""
        if not self.simulation.cluster.is_divided and not self.simulation.cluster.executor.is_remote:
            return min(self.simulation.idle.values(), default=0.0)
        owned = self.simulation.owned_seconds
        return max(0.0, 1 - self.simulation.held_seconds / owned) if owned else 0.0

    @property
    def bases(self) -> dict[str, float]:
        """The shares of the stages' time with predictions that are measured, scaled or analytic."""
        found: dict[str, float] = {}
        for prediction in self.simulation.predictions.values():
            found[prediction.basis] = found.get(prediction.basis, 0.0) + prediction.seconds
        total = sum(found.values())
        return {basis: seconds / total for basis, seconds in sorted(found.items())} if total else {}

    def seconds_with(self, factors: Mapping[str, float]) -> float:
        """Seconds of the run if the times of stages of these shapes, and of the queue, are multiplied by these
        factors."""
        seen, queue = self.simulation, factors.get(QUEUE, 1.0)
        scaled = {
            name: replace(
                one.sped_up(1 - factors[self.shapes[name]]), queue=queue * one.queue, finish=queue * one.finish
            )
            for name, one in seen.predictions.items()
        }
        return simulate(seen.order, seen.cluster, scaled, seen.conditions).total


class ImpossiblePlanError(UserError):
    """A plan is impossible; the message says why."""


class UnknownCostError(ImpossiblePlanError):
    """A plan has stages without a prediction."""

    def __init__(self, stages: Sequence[str]) -> None:
        super().__init__(describe_unknown(stages))
        self.stages = tuple(stages)


def evaluate(setting: SearchedRun, section: PlacementSection) -> ExpectedRun:
    """Place a plan and simulate it.

    Raises:
        ImpossiblePlanError: it asks for more devices or memory than there are, or for a layout that a model does not
            allow.
        UnknownCostError: a stage has no prediction.
    """
    config = setting.with_section(section)
    if section.strategy == "async" and not setting.graph.lag:
        raise ImpossiblePlanError("async is for runs with a lag, and this one has none.")
    if section.strategy == "colocated" and not config.executor.warm:
        raise ImpossiblePlanError("colocated needs processes that stay loaded, but executor.warm is false.")
    if section.streaming and setting.detached:
        raise ImpossiblePlanError("placement.streaming needs a driver, and a detached run has none.")
    cluster, on_gpu, room_of_all = setting.cluster_of(config), setting.on_gpu, setting.device.bytes
    try:
        graph = place(setting.graph, cluster)
        for mistake in device_mistakes(graph, cluster):
            raise mistake
        for node in graph.nodes.values():
            for use in node.stage.models(node.config):
                for requirement in layout_requirements(use, graph):
                    requirement()
    except UserError as error:
        raise ImpossiblePlanError(str(error)) from error
    known = {name: setting.predictor.predict(node, graph) for name, node in graph.nodes.items()}
    predictions = {name: one for name, one in known.items() if one is not None}
    if len(predictions) < len(known):
        raise UnknownCostError([name for name, one in known.items() if one is None])
    sizes: dict[str, int] = {}
    for name, node in graph.nodes.items():
        estimate = memory(node, graph, on_gpu=on_gpu)
        needed = needed_memory(estimate, predictions[name], node, on_gpu) or 0
        if on_gpu and not node.stage.uses_devices(node.config):
            needed = 0  # it uses CPU memory
        room = int((estimate.share if estimate is not None else 1.0) * setting.device.bytes)
        sizes[name] = needed
        if needed > room and room_of_all and (setting.is_jobs or cluster.executor.entry(node).kind in LOCAL_KINDS):
            raise ImpossiblePlanError(
                f"{name} needs {format_bytes(needed)} of {format_bytes(room)} on {setting.device.name}."
            )
    order = start_order(graph, config)
    most = peak_memory(order, sizes, setting.concurrent_stages(streaming=section.streaming), cluster, room_of_all)
    if most > room_of_all and not setting.is_jobs:
        raise ImpossiblePlanError(
            f"stages that may run at the same time need {format_bytes(most)} together of "
            f"{format_bytes(setting.device.bytes)} on {setting.device.name}."
        )
    if section.strategy == "colocated" and (kept := resident_memory(order, sizes)) > setting.device.bytes:
        raise ImpossiblePlanError(
            f"what stays loaded needs {format_bytes(kept)} together of {format_bytes(setting.device.bytes)} on "
            f"{setting.device.name}."
        )
    conditions = ScheduleConditions(
        streams(graph, config), setting.driver, *contention(order, cluster, setting.threads)
    )
    largest = max(sizes.values(), default=0) if setting.is_jobs else 0
    return ExpectedRun(section, simulate(order, cluster, predictions, conditions), shapes_of(graph), largest)


def shapes_of(graph: Graph) -> dict[str, str]:
    """The shape of each stage of a placed graph, by name."""
    return {name: shape_of(node) for name, node in graph.nodes.items()}


def shape_of(node: Node) -> str:
    """The shape of a placed stage: its role and its layout, as a text."""
    layout = node.stage.layout(node.config)
    own = {key: getattr(node.config, key) for key in node.stage.layout_keys if hasattr(node.config, key)}
    return f"{node.role}: {layout.shown or layout.processes} {own}"


def peak_memory(
    order: Iterable[Node],
    sizes: Mapping[str, int],
    concurrent: Mapping[str, set[str]],
    cluster: Cluster,
    room: int,
) -> int:
    """The peak of the memory that stages share, in bytes, over all possible orders: of CPU memory on a machine without
    GPUs, or of GPUs that several stages use at once. The search stops at the first sum above `room`.

    Stages that depend on each other never run at the same time, unless one streams from the other, nor do stages that
    share an exclusive device.

    Args:
        concurrent: by stage, the stages that can run at the same time (`SearchedRun.concurrent_stages`).
    """
    if cluster.gpus and (cluster.is_divided or cluster.parallel == 1):
        return max(sizes.values(), default=0)
    places = {node.name: node.placement for node in order}
    names = sorted(
        (name for name, place in places.items() if sizes[name] and place is not None and place.executor in LOCAL_KINDS),
        key=lambda name: -sizes[name],
    )
    at_once = len(names)
    if not cluster.is_divided:
        at_once = cluster.parallel
    elif cluster.executor.parallel is not None:
        at_once = cluster.executor.parallel
    if sum(sizes[name] for name in names[:at_once]) <= room:
        return sum(sizes[name] for name in names[:at_once])

    def can_run_together(one: str, other: str) -> bool:
        mine, theirs = places[one], places[other]
        if other not in concurrent[one] or mine is None or theirs is None:
            return False
        return not (mine.exclusive and theirs.exclusive and mine.devices and mine.bits & theirs.bits)

    best = 0

    def extend(chosen: int, left: list[str], count: int) -> None:
        nonlocal best
        best = max(best, chosen)
        for number, name in enumerate(left):
            if best > room or count == at_once:
                return
            if chosen + sum(sizes[other] for other in left[number : number + at_once - count]) <= best:
                return
            fitting = [other for other in left[number + 1 :] if can_run_together(name, other)]
            extend(chosen + sizes[name], fitting, count + 1)

    extend(0, names, 0)
    return best


def resident_memory(order: Iterable[Node], sizes: Mapping[str, int]) -> int:
    """Bytes of everything that processes keep loaded, plus those of the largest stage that keeps nothing."""
    kept: dict[str, int] = {}
    largest = 0
    for node in order:
        if label := node.stage.label(node.config):
            kept[label] = max(kept.get(label, 0), sizes[node.name])
        else:
            largest = max(largest, sizes[node.name])
    return sum(kept.values()) + largest


class PlanTable:
    """Evaluates plans quickly, many per second."""

    def __init__(
        self, setting: SearchedRun, options: LayoutOptions | None = None, shapes: Collection[str] | None = None
    ) -> None:
        """Prepare the table for a run.

        Args:
            setting: the run.
            options: the layout options of another table of the same run, to reuse.
            shapes: use only layouts that have one of these shapes (`shape_of`) or that runs have used.
        """
        self.setting = setting
        self._shapes = shapes
        self._seen: dict[tuple[str, int, bool], list[LayoutOption]] = {}
        self._clusters = {
            divided: setting.cluster_of(
                setting.config
                if setting.is_jobs
                else setting.with_section(PlacementSection(strategy="interleaving" if divided else "flattening"))
            )
            for divided in (False, True)
        }
        whole = self._clusters[False]
        self.devices = 0 if setting.is_jobs else whole.devices
        """Devices of this machine that plans divide; 0 if all stages are a scheduler's jobs."""
        self.on_gpu = setting.on_gpu
        if setting.is_jobs:
            self.roles = scheduler_roles(setting.graph, place(setting.graph, whole), whole)
        else:
            self.roles = local_roles(setting.graph, whole)
        self.options = options or LayoutOptions(
            setting.graph, whole, self._clusters[True], setting.device, setting.predictor, on_gpu=self.on_gpu
        )
        self.evaluated = 0
        self.out_of_room = 0
        """Number of plans whose stages fit into memory one by one, but not together."""
        roles = {role.name for role in self.roles}
        self._order = [node.name for node in start_order(setting.graph, setting.config)]
        self._others: dict[bool, dict[str, Node]] = {}
        self.fixed: dict[str, Prediction] = {}
        for divided, cluster in self._clusters.items():
            given = placements(setting.graph, cluster)
            self._others[divided] = {
                name: place_stage(node, given[name], configured_sizes(node, cluster.placement), cluster)
                for name, node in setting.graph.nodes.items()
                if node.role not in roles
            }
        self.streams = setting.streams
        """The stages that stream from others in plans with streaming."""
        self._sizes: dict[str, int] = {}
        self.unknown: list[str] = []
        """Stages without devices that have no prediction."""
        for name, node in self._others[False].items():
            one = setting.predictor.predict(node, setting.graph)
            if one is None:
                self.unknown.append(name)
                continue
            self.fixed[name] = one
            estimate = memory(node, setting.graph, on_gpu=self.on_gpu)
            self._sizes[name] = 0 if self.on_gpu else needed_memory(estimate, one, node, False) or 0
        self._parts: dict[frozenset[str], dict[str, tuple[int, ...]]] = {}
        self._nodes: dict[tuple[str, Placement, tuple[tuple[str, object], ...]], Node] = {}
        self._costs: dict[PlanChoice, tuple[float, ...] | None] = {}

    def can_stream(self, plan: PlanChoice) -> bool:
        """Whether a stage can have devices at the same time as the stage that it streams from."""
        if not self.streams or self.setting.detached:
            return False
        return self.setting.is_jobs or plan.divided or self._clusters[False].parallel > 1

    def devices_of(self, plan: PlanChoice) -> list[tuple[int, ...]]:
        """The devices that a plan gives each role."""
        if self.setting.is_jobs:
            return [tuple(range(role.requested or 0)) for role in self.roles]
        everything = tuple(range(self.devices))
        if not plan.divided:
            return [everything] * len(self.roles)
        pools = pool_devices(plan.pools)
        found = [everything if place == WHOLE else pools[place] for place in plan.places]
        unpooled = frozenset(
            role.name
            for role, place in zip(self.roles, plan.places, strict=True)
            if place == WHOLE and role.workload == "scoring"
        )
        if unpooled:
            parts = self._parts_of(unpooled)
            found = [parts.get(role.name, had) for role, had in zip(self.roles, found, strict=True)]
        return found

    def _parts_of(self, roles: frozenset[str]) -> dict[str, tuple[int, ...]]:
        """The parts of the machine for scorers in no pool."""
        if roles not in self._parts:
            data: dict[str, Any] = {"strategy": "interleaving"}
            rest = [role.name for role in self.roles if role.workload == "scoring" and role.name not in roles]
            if rest:  # put the other scorers into a pool, so that they take no part
                data |= {"pools": {"x": {"devices": self.devices}}, "stages": {role: {"pool": "x"} for role in rest}}
            section = PlacementSection.model_validate(data)
            cluster = replace(self._clusters[True], placement=section)
            given = placements(self.setting.graph, cluster)
            self._parts[roles] = {
                role.name: given[role.nodes[0].name].devices for role in self.roles if role.name in roles
            }
        return self._parts[roles]

    def options_of(self, plan: PlanChoice) -> list[list[LayoutOption]]:
        """The layout options of each role on its devices."""
        given = self.devices_of(plan)
        return [
            self._options(role, len(devices), plan.divided) for role, devices in zip(self.roles, given, strict=True)
        ]

    def _options(self, role: RoleStages, devices: int, exclusive: bool) -> list[LayoutOption]:
        found = self.options.of(role, devices, exclusive)
        if self._shapes is None:
            return found
        key = (role.name, devices, exclusive)
        if key not in self._seen:
            self._seen[key] = [
                option
                for option in found
                if shape_of(option.nodes[-1]) in self._shapes
                or all(one.basis == "measured" for one in option.predictions)
            ]
        return self._seen[key]

    def cost(self, plan: PlanChoice) -> tuple[float, ...] | None:
        """The cost of a plan, compared in order: seconds, device-seconds, number of changes. None if it is
        impossible."""
        if plan not in self._costs:
            self._costs[plan] = self._cost(plan)
        return self._costs[plan]

    def _cost(self, plan: PlanChoice) -> tuple[float, ...] | None:
        self.evaluated += 1
        cluster = self._clusters[plan.divided]
        given = self.devices_of(plan)
        nodes = dict(self._others[plan.divided])
        predictions = dict(self.fixed)
        sizes = dict(self._sizes)
        for number, (role, devices) in enumerate(zip(self.roles, given, strict=True)):
            options = self._options(role, len(devices), plan.divided)
            option = next((one for one in options if one.layout == plan.layouts[number]), None)
            if option is None:
                return None
            if role.requested is not None:
                for node, prediction in zip(option.nodes, option.predictions, strict=True):
                    nodes[node.name], predictions[node.name] = node, prediction
                continue
            numbers = devices if plan.divided or self.on_gpu else (0,)
            pool = "" if plan.places[number] == WHOLE or not plan.divided else str(plan.places[number])
            kind = option.nodes[0].placement.executor if option.nodes[0].placement else ""
            place = Placement(kind, numbers, pool, exclusive=plan.divided)
            for node, prediction in zip(option.nodes, option.predictions, strict=True):
                key = (node.name, place, option.layout)
                if (placed := self._nodes.get(key)) is None:
                    placed = self._nodes[key] = replace(node, placement=place)
                nodes[node.name], predictions[node.name], sizes[node.name] = placed, prediction, option.memory
        order = [nodes[name] for name in self._order]
        room = self.setting.device.bytes
        concurrent = self.setting.concurrent_stages(streaming=plan.streaming)
        if not self.setting.is_jobs and peak_memory(order, sizes, concurrent, cluster, room) > room:
            self.out_of_room += 1
            return None
        shared = contention(order, cluster, self.setting.threads)
        following = self.streams if plan.streaming else {}
        found = simulate(order, cluster, predictions, ScheduleConditions(following, self.setting.driver, *shared))
        changes = sum(map(bool, plan.layouts)) + len(plan.pools) + plan.streaming
        return round(found.total, 6), round(found.held_seconds, 6), plan.divided + changes
