"""Simulates a run: how long it takes, what it costs, and what it waits for, from predictions for its stages.

The simulation uses the driver's scheduling rule (pipelines/planning/scheduling.py), its graph and its devices. The
predictions come from pipelines/planning/prediction.py. A stage without one is never counted as zero: the simulation is
refused, or its result is marked as a lower bound.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from contracts.errors import UserError
from pipelines.config.executor import LOCAL_KINDS
from pipelines.graph import Graph, Node, Placement
from pipelines.planning.cluster import Cluster
from pipelines.planning.prediction import Prediction, Predictor
from pipelines.planning.scheduling import StageTimes, StageWork, Streams, simulate_schedule

SHOWN = 3
"""Maximum number of stages that a message names."""


@dataclass(frozen=True)
class DriverCosts:
    """Time that the driver itself takes, in seconds."""

    start: float = 0.0
    """Time to start a stage that is ready."""
    end: float = 0.0
    """Time to notice the end of a stage, check its output and record it."""


@dataclass(frozen=True)
class ScheduleConditions:
    """The conditions that determine a schedule in addition to the stages' order, devices and times."""

    streams: Streams = field(default_factory=dict)
    """The stages that stream from others (`scheduling.streams`)."""
    driver: DriverCosts = DriverCosts()
    """The driver's own time."""
    demands: Mapping[str, float] = field(default_factory=dict)
    """Each stage's demand for the shared resource (`contention`); empty: stages do not slow each other down."""
    room: float = math.inf
    """The amount of the shared resource."""

    def simulate(
        self, order: Sequence[Node], cluster: Cluster, works: Mapping[str, StageWork]
    ) -> dict[str, StageTimes]:
        """The times of each stage."""
        return simulate_schedule(
            order,
            cluster,
            works,
            streams=self.streams,
            room=self.room,
            start_seconds=self.driver.start,
            end_seconds=self.driver.end,
        )


@dataclass(frozen=True)
class PathStep:
    """A stage on the critical path of a simulated run."""

    stage: str
    waits_for: str
    """The reason why it could not start earlier: inputs, devices, or nothing."""
    seconds: float
    """Seconds from the end of the stage before it to its own."""


@dataclass(frozen=True)
class Simulation:
    """A simulated run; statistics are computed on demand."""

    order: Sequence[Node]
    """The stages of a placed graph, the most urgent first."""
    cluster: Cluster
    predictions: Mapping[str, Prediction]
    times: Mapping[str, StageTimes]
    conditions: ScheduleConditions = ScheduleConditions()
    unknown: tuple[str, ...] = ()
    """Stages that take no time here because nothing is known of them; if there are any, all results are lower
    bounds."""

    @functools.cached_property
    def total(self) -> float:
        """Seconds from the beginning of the run to its end."""
        return max((times.end for times in self.times.values()), default=0.0)

    @functools.cached_property
    def iterations(self) -> list[float]:
        """Seconds from one policy to the next: from the end of the previous training (or the beginning) to that of the
        iteration's own."""
        ends = {node.iteration or 0: self.times[node.name].end for node in self.order if node.role == "training"}
        whole = [0.0, *(ends[number] for number in sorted(ends))]
        return [end - before for before, end in itertools.pairwise(whole)]

    @functools.cached_property
    def held_seconds(self) -> float:
        """Device-seconds that stages hold."""
        return sum(self.times[node.name].held * self.devices_of(node) for node in self.order)

    @functools.cached_property
    def computing_seconds(self) -> float:
        """The part of `held_seconds` in which stages compute, without starting, loading and publishing."""
        known = ((node, self.predictions.get(node.name)) for node in self.order)
        return sum(one.compute * self.devices_of(node) for node, one in known if one is not None)

    @functools.cached_property
    def owned_seconds(self) -> float:
        """Device-seconds of this machine's devices over the whole run, plus those that jobs hold on a scheduler."""
        jobs = [
            node for node in self.order if node.placement is not None and node.placement.executor not in LOCAL_KINDS
        ]
        on_scheduler = sum(self.times[node.name].held * self.devices_of(node) for node in jobs)
        return on_scheduler + (0.0 if self.cluster.executor.is_remote else self.total * self.cluster.devices)

    def devices_of(self, node: Node) -> int:
        """The number of devices that a stage holds, or requests from a scheduler."""
        placement = node.placement
        if placement is None or not node.stage.uses_devices(node.config):
            return 0
        return len(placement.devices) if placement.executor in LOCAL_KINDS else self.cluster.requested_devices(node)

    @functools.cached_property
    def memory(self) -> dict[int, tuple[int, str]]:
        """By device, the peak bytes of the stages on it, and the stage that takes most at the peak; without GPUs, under
        -1 those of all processes together."""
        on_gpu = self.cluster.gpus > 0
        groups: dict[Placement, list[tuple[float, float, int, str]]] = {}
        for node in self.order:
            one, times = self.predictions.get(node.name), self.times[node.name]
            if (
                one is None
                or one.memory is None
                or node.placement is None
                or node.placement.executor not in LOCAL_KINDS
            ):
                continue
            if not on_gpu:
                count = node.stage.layout(node.config).processes
                groups.setdefault(HOST, []).append((times.start, times.end, one.memory * count, node.name))
            elif node.placement.devices and node.stage.uses_devices(node.config):
                groups.setdefault(node.placement, []).append((times.start, times.end, one.memory, node.name))
        found: dict[int, tuple[int, str]] = {}
        for placement, stages in groups.items():
            peak = _peak(stages)
            for device in placement.devices:
                found[device] = max(found.get(device, (0, "")), peak)
        return found

    def exceeding(self, room: int) -> tuple[str, int] | None:
        """The stage that exceeds `room` bytes on one device (or of a machine without GPUs), and the peak; None if none
        does."""
        peak, stage = max(self.memory.values(), default=(0, ""))
        return (stage, peak) if peak > room else None

    @functools.cached_property
    def idle(self) -> dict[str, float]:
        """By pool ("": devices in no pool), the share of the time in which its devices are idle."""
        lines: dict[str, list[tuple[Node, int]]] = {}
        for node in self.order:
            if (
                (count := self.devices_of(node))
                and node.placement is not None
                and node.placement.executor in LOCAL_KINDS
            ):
                lines.setdefault(node.placement.pool, []).append((node, count))
        found = {}
        for pool, members in lines.items():
            if self.cluster.is_divided:
                bits = functools.reduce(int.__or__, (node.placement.bits for node, _ in members if node.placement))
                work = sum(self.times[node.name].held * count for node, count in members)
                room = bits.bit_count() * self.total
            else:
                work = sum(self.times[node.name].held for node, _ in members)
                room = self.cluster.parallel * self.total
            found[pool] = max(0.0, 1 - work / room) if room else 0.0
        return found

    @functools.cached_property
    def path(self) -> list[PathStep]:
        """The critical path from the beginning to the end: each stage began when the one before had ended, because it
        reads its output or needed its devices."""
        nodes = {node.name: node for node in self.order}
        found: list[PathStep] = []
        name = max(self.times, key=lambda name: self.times[name].end, default=None)
        while name is not None:
            node, times = nodes[name], self.times[name]
            before = [need for need in node.needs if need in self.times and self.times[need].end <= times.submitted]
            last = max(before, key=lambda need: self.times[need].end, default=None)
            ready = self.times[last].end if last is not None else 0.0
            why = "inputs" if last is not None else "nothing"
            freed = max(
                (
                    other
                    for other, theirs in self.times.items()
                    if ready < theirs.end <= times.submitted and self._share_devices(node, nodes[other])
                ),
                key=lambda other: self.times[other].end,
                default=None,
            )
            if freed is not None:
                last, why = freed, "devices"
            since = self.times[last].end if last is not None else 0.0
            found.append(PathStep(name, why, times.end - since))
            name = last
        return found[::-1]

    def _share_devices(self, one: Node, other: Node) -> bool:
        places = one.placement, other.placement
        if places[0] is None or places[1] is None or places[0].executor != places[1].executor:
            return False
        return bool(places[0].bits & places[1].bits)

    @functools.cached_property
    def path_by_kind(self) -> dict[str, float]:
        """Seconds of `path` by kind of stage (`kind_of`), the largest first."""
        nodes = {node.name: node for node in self.order}
        found: dict[str, float] = {}
        for step in self.path:
            kind = kind_of(nodes[step.stage])
            found[kind] = found.get(kind, 0.0) + step.seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))


HOST = Placement("", (-1,))
"""Placeholder for the memory of a machine without GPUs."""


def _peak(stages: list[tuple[float, float, int, str]]) -> tuple[int, str]:
    """The maximum sum of sizes at any time, and the largest member then."""
    changes = sorted(
        [(start, 1, size, name) for start, end, size, name in stages if end > start]
        + [(end, 0, size, name) for start, end, size, name in stages if end > start]
    )  # at equal times ends come before starts
    peak, now, largest = 0, 0, ""
    here: dict[str, int] = {}
    for _, begins, size, name in changes:
        if begins:
            now += size
            here[name] = size
            if now > peak:
                peak, largest = now, max(here, key=here.__getitem__)
        else:
            now -= size
            del here[name]
    return peak, largest


def kind_of(node: Node) -> str:
    """The kind of a stage in a word, the same in all iterations: generation, reward, training."""
    return node.role.rpartition("/")[2] if node.iteration is not None else node.stage.name


def predict_all(graph: Graph, predictor: Predictor) -> dict[str, Prediction]:
    """The predictions for the stages of a placed graph; stages without one are left out."""
    found = {name: predictor.predict(node, graph) for name, node in graph.nodes.items()}
    return {name: one for name, one in found.items() if one is not None}


def with_queue(predictions: Mapping[str, Prediction], order: Iterable[Node], seconds: float) -> dict[str, Prediction]:
    """Set the queue time of the stages that use devices."""
    queued = {node.name for node in order if seconds and node.stage.uses_devices(node.config)}
    return {name: replace(one, queue=seconds) if name in queued else one for name, one in predictions.items()}


def simulate(
    order: Sequence[Node],
    cluster: Cluster,
    predictions: Mapping[str, Prediction],
    conditions: ScheduleConditions = ScheduleConditions(),
    *,
    bound: bool = False,
) -> Simulation:
    """Simulate the stages of a placed graph with their predicted times.

    Args:
        order: the stages, the most urgent first (`scheduling.start_order`).
        cluster: the cluster that they are placed on.
        predictions: predictions by stage.
        conditions: streaming, driver costs and contention.
        bound: let stages without a prediction take no time, which makes the result a lower bound.

    Raises:
        UserError: a stage has no prediction, and `bound` is false.
    """
    unknown = tuple(node.name for node in order if node.name not in predictions)
    if unknown and not bound:
        raise UserError(f"the time of the run cannot be predicted: {describe_unknown(unknown)}")
    works = {name: StageWork(0.0) for name in unknown}
    for name, one in predictions.items():
        demand = conditions.demands.get(name, 0.0)
        works[name] = StageWork(one.seconds, one.queue, demand, finish=one.finish)
    times = conditions.simulate(order, cluster, works)
    return Simulation(order, cluster, predictions, times, conditions, unknown)


def sensitivities(simulation: Simulation, faster: float = 0.1) -> dict[str, float]:
    """By kind of stage, the share of the run's time that is saved if its stages take `faster` less, the largest first.

    Kinds with a large gain are the bottleneck; those that have slack gain nothing.
    """
    nodes = {node.name: node for node in simulation.order}
    found = {}
    for kind in dict.fromkeys(kind_of(node) for node in simulation.order):
        less = {
            name: one.sped_up(faster) if kind_of(nodes[name]) == kind else one
            for name, one in simulation.predictions.items()
        }
        other = simulate(simulation.order, simulation.cluster, less, simulation.conditions, bound=True)
        found[kind] = 1 - other.total / simulation.total if simulation.total else 0.0
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def describe_unknown(unknown: Sequence[str]) -> str:
    """A message that names the stages without a prediction, and says what to do about it."""
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    return (
        f"there is no prediction for {', '.join(unknown[:SHOWN])}{more}. Run the stage once (every run records the "
        "times of its stages), or provide its model's config.json and its data, so that it can be estimated."
    )


def contention(
    order: Iterable[Node], cluster: Cluster, threads: int | Callable[[Node], int]
) -> tuple[dict[str, float], float]:
    """Each stage's demand for a shared resource, and the amount that is available.

    Without GPUs the resource is the machine's cores: each process of a stage uses as many as it has threads. With GPUs
    that several stages may use at once (`executor.parallel`), it is the GPUs.
    """
    if cluster.is_divided:
        return {}, math.inf
    here = [node for node in order if node.placement is None or node.placement.executor in LOCAL_KINDS]
    if not cluster.gpus:
        each = threads if callable(threads) else lambda _: threads
        uses = {node.name: float(each(node) * node.stage.layout(node.config).processes) for node in here}
        return uses, float(cluster.cores)
    if cluster.parallel == 1:
        return {}, math.inf
    return {node.name: 1.0 for node in here if node.stage.uses_devices(node.config)}, 1.0
