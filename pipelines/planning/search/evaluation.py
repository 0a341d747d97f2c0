"""What a plan is expected to take, or why it cannot be.

A plan's section is placed and simulated as the driver would run it. The search itself looks at thousands of plans, for
which it takes each stage's options from a table; what it then proposes is evaluated as a section again.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from contracts.errors import UserError
from pipelines.config.executor import HERE
from pipelines.config.placement import PlacementSection
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Node, Placement
from pipelines.planning.cluster import Cluster
from pipelines.planning.estimates import memory
from pipelines.planning.memory import Device, size
from pipelines.planning.placement import place, place_stage, written_sizes
from pipelines.planning.prediction import Prediction, Predictor
from pipelines.planning.preflight import device_mistakes, layout_requirements
from pipelines.planning.scheduling import Streams, in_order, streams
from pipelines.planning.search.layouts import (
    Option,
    Options,
    RoleStages,
    calls_of,
    calls_on_scheduler,
    needed_memory,
)
from pipelines.planning.search.plans import WHOLE, PlanChoice, offsets
from pipelines.planning.simulation import DriverCosts, Simulation, Surroundings, contention, simulate, unknown_in_words
from pipelines.planning.strategies import placements

QUEUE = "queue"
"""What a scheduler's queue is called among the shapes, whose errors are drawn."""


@dataclass(frozen=True)
class SearchedRun:
    """What plans are made for."""

    config: RunConfig
    graph: Graph
    """Its stages, not placed."""
    predictor: Predictor
    device: Device
    """That the memory of a stage is compared with."""
    cluster_of: Callable[[RunConfig], Cluster]
    """What a run with a config has."""
    threads: int = 1
    """Of each process, on a machine without GPUs."""
    driver: DriverCosts = field(default=DriverCosts())
    detached: bool = False
    """Whether a scheduler's jobs are submitted all at once, and no driver stays."""

    @functools.cached_property
    def is_jobs(self) -> bool:
        """Whether every stage that uses devices is a scheduler's jobs, so that no plan gives it devices."""
        heavy = [node for node in self.graph.nodes.values() if node.stage.uses_devices(node.config)]
        return bool(heavy) and not any(self.config.executor.entry(node).kind in HERE for node in heavy)

    @functools.cached_property
    def on_gpu(self) -> bool:
        """Whether stages that use devices compute on GPUs."""
        cluster = self.cluster_of(self.config)
        if not self.is_jobs:
            return cluster.gpus > 0
        return cluster.scheduler_has_gpus and self.config.executor.asks_gpus

    def with_section(self, section: PlacementSection) -> RunConfig:
        """The config with another plan."""
        return self.config.model_copy(update={"placement": section})

    @functools.cached_property
    def streams(self) -> Streams:
        """Which stages follow which where they may."""
        section = self.config.placement.model_copy(update={"streaming": True})
        return streams(self.graph, self.with_section(section))

    @functools.cached_property
    def _unrelated(self) -> dict[str, set[str]]:
        """By stage those that it neither needs nor is needed by."""
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

    def beside(self, *, streaming: bool) -> Mapping[str, set[str]]:
        """By stage those that can run at the same time: neither needs the other, or it follows it."""
        return self._following if streaming else self._unrelated

    @functools.cached_property
    def _following(self) -> dict[str, set[str]]:
        found = {name: set(others) for name, others in self._unrelated.items()}
        for follower, (maker, _) in self.streams.items():
            found[follower].add(maker)
            found[maker].add(follower)
        return found


@dataclass(frozen=True)
class ExpectedRun:
    """A plan that can be, and what it is expected to take."""

    section: PlacementSection
    simulation: Simulation
    shapes: Mapping[str, str]
    """By stage what decides the error of its prediction: its role and its layout."""
    largest: int = 0
    """Bytes on a device of the stage of a scheduler's jobs that takes most."""

    @property
    def seconds(self) -> float:
        """Of the run."""
        return self.simulation.total

    @property
    def device_hours(self) -> float:
        """In which stages have devices."""
        return self.simulation.held_seconds / 3600

    @property
    def memory(self) -> int:
        """Bytes on the fullest device, of what is predicted."""
        return max((peak for peak, _ in self.simulation.memory.values()), default=self.largest)

    @property
    def idle(self) -> float:
        """The share of all devices' time in which no stage has them."""
        if not self.simulation.cluster.is_divided and not self.simulation.cluster.executor.is_remote:
            return min(self.simulation.idle.values(), default=0.0)
        owned = self.simulation.owned_seconds
        return max(0.0, 1 - self.simulation.held_seconds / owned) if owned else 0.0

    @property
    def bases(self) -> dict[str, float]:
        """The share of the stages' time that is measured, scaled or analytic."""
        found: dict[str, float] = {}
        for prediction in self.simulation.predictions.values():
            found[prediction.basis] = found.get(prediction.basis, 0.0) + prediction.seconds
        total = sum(found.values())
        return {basis: seconds / total for basis, seconds in sorted(found.items())} if total else {}

    def seconds_with(self, factors: Mapping[str, float]) -> float:
        """Of the run, if stages of these shapes took so many times what is predicted, and so did the queue."""
        seen, queue = self.simulation, factors.get(QUEUE, 1.0)
        scaled = {
            name: replace(
                one.faster(1 - factors[self.shapes[name]]), queue=queue * one.queue, finish=queue * one.finish
            )
            for name, one in seen.predictions.items()
        }
        return simulate(seen.order, seen.cluster, scaled, seen.surroundings).total


class ImpossiblePlanError(UserError):
    """A plan that cannot be, with the reason."""


class UnknownCostError(ImpossiblePlanError):
    """A plan with a stage of which nothing is known."""

    def __init__(self, stages: Sequence[str]) -> None:
        super().__init__(unknown_in_words(stages))
        self.stages = tuple(stages)


def evaluate(setting: SearchedRun, section: PlacementSection) -> ExpectedRun:
    """Place a plan, and run it in advance.

    Raises:
        ImpossiblePlanError: it asks for more devices or memory than there are, or for what a model cannot take.
        UnknownCostError: nothing is known of one of its stages.
    """
    config = setting.with_section(section)
    if section.strategy == "async" and not setting.graph.lag:
        raise ImpossiblePlanError("async is for runs with a lag, which this one has not.")
    if section.strategy == "colocated" and not config.executor.warm:
        raise ImpossiblePlanError("colocated is for processes that stay, but executor.warm is false.")
    if section.streaming and setting.detached:
        raise ImpossiblePlanError("placement.streaming takes a driver that stays.")
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
            needed = 0  # what it takes is the machine's
        room = int((estimate.share if estimate is not None else 1.0) * setting.device.bytes)
        sizes[name] = needed
        if needed > room and room_of_all and (setting.is_jobs or cluster.executor.entry(node).kind in HERE):
            raise ImpossiblePlanError(f"{name} needs {size(needed)} of {size(room)} on {setting.device.name}.")
    order = in_order(graph, config)
    most = most_together(order, sizes, setting.beside(streaming=section.streaming), cluster, room_of_all)
    if most > room_of_all and not setting.is_jobs:
        raise ImpossiblePlanError(
            f"stages that may run at the same time need {size(most)} together of {size(setting.device.bytes)} on "
            f"{setting.device.name}."
        )
    if section.strategy == "colocated" and (kept := kept_loaded(order, sizes)) > setting.device.bytes:
        raise ImpossiblePlanError(
            f"what stays loaded needs {size(kept)} together of {size(setting.device.bytes)} on {setting.device.name}."
        )
    surroundings = Surroundings(streams(graph, config), setting.driver, *contention(order, cluster, setting.threads))
    largest = max(sizes.values(), default=0) if setting.is_jobs else 0
    return ExpectedRun(section, simulate(order, cluster, predictions, surroundings), shapes_of(graph), largest)


def shapes_of(graph: Graph) -> dict[str, str]:
    """By stage of a placed graph its role and what of its config a layout decides."""
    return {name: shape_of(node) for name, node in graph.nodes.items()}


def shape_of(node: Node) -> str:
    """The same of one stage."""
    layout = node.stage.layout(node.config)
    own = {key: getattr(node.config, key) for key in node.stage.layout_keys if hasattr(node.config, key)}
    return f"{node.role}: {layout.shown or layout.processes} {own}"


def most_together(
    order: Iterable[Node],
    sizes: Mapping[str, int],
    beside: Mapping[str, set[str]],
    cluster: Cluster,
    room: int,
) -> int:
    """The most bytes that stages may have at any time of the memory that they share, whenever each runs: that of the
    machine where it has no GPU, or that of GPUs which several stages have at once. No more is found out than whether
    it is more than there is room for.

    Stages that need each other never run at the same time unless one follows the other, nor do those with a device in
    common that each has for itself.

    Args:
        beside: by stage those that can run at the same time (`SearchedRun.beside`).
    """
    if cluster.gpus and (cluster.is_divided or cluster.parallel == 1):
        return max(sizes.values(), default=0)
    places = {node.name: node.placement for node in order}
    names = sorted(
        (name for name, place in places.items() if sizes[name] and place is not None and place.executor in HERE),
        key=lambda name: -sizes[name],
    )
    at_once = len(names)
    if not cluster.is_divided:
        at_once = cluster.parallel
    elif cluster.executor.parallel is not None:
        at_once = cluster.executor.parallel
    if sum(sizes[name] for name in names[:at_once]) <= room:
        return sum(sizes[name] for name in names[:at_once])

    def go_together(one: str, other: str) -> bool:
        mine, theirs = places[one], places[other]
        if other not in beside[one] or mine is None or theirs is None:
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
            fitting = [other for other in left[number + 1 :] if go_together(name, other)]
            extend(chosen + sizes[name], fitting, count + 1)

    extend(0, names, 0)
    return best


def kept_loaded(order: Iterable[Node], sizes: Mapping[str, int]) -> int:
    """Bytes of all that processes keep loaded, and of the largest stage that keeps nothing."""
    kept: dict[str, int] = {}
    largest = 0
    for node in order:
        if label := node.stage.label(node.config):
            kept[label] = max(kept.get(label, 0), sizes[node.name])
        else:
            largest = max(largest, sizes[node.name])
    return sum(kept.values()) + largest


class PlanTable:
    """Evaluates plans of the space, many times a second."""

    def __init__(
        self, setting: SearchedRun, options: Options | None = None, shapes: Collection[str] | None = None
    ) -> None:
        """The plans of a run.

        Args:
            setting: what they are for.
            options: those of another table of the same run.
            shapes: look only at layouts that are one of these, or that runs have shown (`shape_of`).
        """
        self.setting = setting
        self._shapes = shapes
        self._seen: dict[tuple[str, int, bool], list[Option]] = {}
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
        """Of this machine, to divide."""
        self.on_gpu = setting.on_gpu
        if setting.is_jobs:
            self.calls = calls_on_scheduler(setting.graph, place(setting.graph, whole), whole)
        else:
            self.calls = calls_of(setting.graph, whole)
        self.options = options or Options(
            setting.graph, whole, self._clusters[True], setting.device, setting.predictor, on_gpu=self.on_gpu
        )
        self.evaluated = 0
        self.out_of_room = 0
        """Plans whose stages fit one by one, but not together."""
        roles = {call.role for call in self.calls}
        self._order = [node.name for node in in_order(setting.graph, setting.config)]
        self._others: dict[bool, dict[str, Node]] = {}
        self.fixed: dict[str, Prediction] = {}
        for divided, cluster in self._clusters.items():
            given = placements(setting.graph, cluster)
            self._others[divided] = {
                name: place_stage(node, given[name], written_sizes(node, cluster.placement), cluster)
                for name, node in setting.graph.nodes.items()
                if node.role not in roles
            }
        self.streams = setting.streams
        """Which stages follow which in plans with streaming."""
        self._sizes: dict[str, int] = {}
        self.unknown: list[str] = []
        """Stages without devices of which nothing is known."""
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
        """Whether a stage can have devices beside the one that it follows."""
        if not self.streams or self.setting.detached:
            return False
        return self.setting.is_jobs or plan.divided or self._clusters[False].parallel > 1

    def devices_of(self, plan: PlanChoice) -> list[tuple[int, ...]]:
        """What the plan gives each role."""
        if self.setting.is_jobs:
            return [tuple(range(call.asked or 0)) for call in self.calls]
        everything = tuple(range(self.devices))
        if not plan.divided:
            return [everything] * len(self.calls)
        pools = offsets(plan.pools)
        found = [everything if place == WHOLE else pools[place] for place in plan.places]
        open_ = frozenset(
            call.role
            for call, place in zip(self.calls, plan.places, strict=True)
            if place == WHOLE and call.workload == "scoring"
        )
        if open_:
            parts = self._parts_of(open_)
            found = [parts.get(call.role, had) for call, had in zip(self.calls, found, strict=True)]
        return found

    def _parts_of(self, roles: frozenset[str]) -> dict[str, tuple[int, ...]]:
        """The parts of the machine that scorers in no pool have."""
        if roles not in self._parts:
            data: dict[str, Any] = {"strategy": "interleaving"}
            rest = [call.role for call in self.calls if call.workload == "scoring" and call.role not in roles]
            if rest:  # a pool of all, for the sake of those that are elsewhere
                data |= {"pools": {"x": {"devices": self.devices}}, "stages": {role: {"pool": "x"} for role in rest}}
            section = PlacementSection.model_validate(data)
            cluster = replace(self._clusters[True], placement=section)
            given = placements(self.setting.graph, cluster)
            self._parts[roles] = {
                call.role: given[call.nodes[0].name].devices for call in self.calls if call.role in roles
            }
        return self._parts[roles]

    def options_of(self, plan: PlanChoice) -> list[list[Option]]:
        """What each role can be on its devices."""
        given = self.devices_of(plan)
        return [
            self._options(call, len(devices), plan.divided) for call, devices in zip(self.calls, given, strict=True)
        ]

    def _options(self, call: RoleStages, devices: int, exclusive: bool) -> list[Option]:
        found = self.options.of(call, devices, exclusive)
        if self._shapes is None:
            return found
        key = (call.role, devices, exclusive)
        if key not in self._seen:
            self._seen[key] = [
                option
                for option in found
                if shape_of(option.nodes[-1]) in self._shapes
                or all(one.basis == "measured" for one in option.predictions)
            ]
        return self._seen[key]

    def cost(self, plan: PlanChoice) -> tuple[float, ...] | None:
        """Seconds; of plans that take the same, device-seconds, then how much they change. None: it cannot be."""
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
        for number, (call, devices) in enumerate(zip(self.calls, given, strict=True)):
            options = self._options(call, len(devices), plan.divided)
            option = next((one for one in options if one.layout == plan.layouts[number]), None)
            if option is None:
                return None
            if call.asked is not None:
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
        beside = self.setting.beside(streaming=plan.streaming)
        if not self.setting.is_jobs and most_together(order, sizes, beside, cluster, room) > room:
            self.out_of_room += 1
            return None
        shared = contention(order, cluster, self.setting.threads)
        following = self.streams if plan.streaming else {}
        found = simulate(order, cluster, predictions, Surroundings(following, self.setting.driver, *shared))
        changes = sum(map(bool, plan.layouts)) + len(plan.pools) + plan.streaming
        return round(found.total, 6), round(found.held_seconds, 6), plan.divided + changes
