"""A run in advance: how long it takes, what it costs, what it waits for, by what its stages are expected to take.

Who runs when is decided by the rule by which the driver decides it (pipelines/planning/scheduling.py), on the graph and
the devices that the driver would have. What stages take comes from elsewhere (pipelines/planning/prediction.py). One of
which that is not known is never counted as nothing: a simulation without it is refused, or is a bound and says so.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from contracts.errors import UserError
from pipelines.config.executor import HERE
from pipelines.graph import Graph, Node, Placement
from pipelines.planning.cluster import Cluster
from pipelines.planning.prediction import Prediction, Predictor
from pipelines.planning.scheduling import StageTimes, StageWork, Streams, course

SHOWN = 3
"""Stages that a message names."""


@dataclass(frozen=True)
class DriverCosts:
    """What the driver itself takes, in seconds."""

    start: float = 0.0
    """To start a stage, after it could."""
    end: float = 0.0
    """To see that one has ended, to check what it has published, and to say so."""


@dataclass(frozen=True)
class Surroundings:
    """What else decides when stages start and end, beside their order, their devices and what they take."""

    streams: Streams = field(default_factory=dict)
    """Which stages follow which (`scheduling.streams`)."""
    driver: DriverCosts = DriverCosts()
    """What the driver takes between them."""
    demands: Mapping[str, float] = field(default_factory=dict)
    """Of what stages share (`contention`), how much each uses; without it they do not slow each other."""
    room: float = math.inf
    """How much there is of it."""

    def course(self, order: Sequence[Node], cluster: Cluster, works: Mapping[str, StageWork]) -> dict[str, StageTimes]:
        """When each of the stages does what."""
        return course(
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
    """A stage on the way from the beginning to the end on which nothing waits but for the one before."""

    stage: str
    waits_for: str
    """What it began after: inputs, devices, or nothing."""
    seconds: float
    """From when it could start to its end."""


@dataclass(frozen=True)
class Simulation:
    """A run as it is expected to be. What is not needed is not computed."""

    order: Sequence[Node]
    """The stages of a placed graph, the most urgent first."""
    cluster: Cluster
    predictions: Mapping[str, Prediction]
    times: Mapping[str, StageTimes]
    surroundings: Surroundings = Surroundings()
    unknown: tuple[str, ...] = ()
    """Stages that it lets take no time, because nothing is known of them: all that it says is a bound from below."""

    @functools.cached_property
    def total(self) -> float:
        """Seconds from the beginning to the end."""
        return max((times.end for times in self.times.values()), default=0.0)

    @functools.cached_property
    def iterations(self) -> list[float]:
        """Seconds from one policy to the next: of each iteration, from the end of the training before it (or from the
        beginning of the run) to that of its own."""
        ends = {node.iteration or 0: self.times[node.name].end for node in self.order if node.role == "training"}
        whole = [0.0, *(ends[number] for number in sorted(ends))]
        return [end - before for before, end in itertools.pairwise(whole)]

    @functools.cached_property
    def held_seconds(self) -> float:
        """Device-seconds in which stages have devices."""
        return sum(self.times[node.name].held * self.devices_of(node) for node in self.order)

    @functools.cached_property
    def computing_seconds(self) -> float:
        """Device-seconds of these in which they compute: neither start, nor load, nor publish."""
        known = ((node, self.predictions.get(node.name)) for node in self.order)
        return sum(one.compute * self.devices_of(node) for node, one in known if one is not None)

    @functools.cached_property
    def owned_seconds(self) -> float:
        """Device-seconds of all that this machine has, until the end, and of what stages have of a scheduler."""
        jobs = [node for node in self.order if node.placement is not None and node.placement.executor not in HERE]
        there = sum(self.times[node.name].held * self.devices_of(node) for node in jobs)
        return there + (0.0 if self.cluster.executor.is_remote else self.total * self.cluster.devices)

    def devices_of(self, node: Node) -> int:
        """How many a stage has; of all that stages share, its part where as many run as may; of a scheduler what is
        asked for it."""
        placement = node.placement
        if placement is None or not node.stage.uses_devices(node.config):
            return 0
        return len(placement.devices) if placement.executor in HERE else self.cluster.asked_of(node)

    @functools.cached_property
    def memory(self) -> dict[int, tuple[int, str]]:
        """By device the most bytes that stages have on it at any time, and the stage that takes most of them then; on a
        machine without GPUs, by -1 those of all processes together."""
        on_gpu = self.cluster.gpus > 0
        groups: dict[Placement, list[tuple[float, float, int, str]]] = {}
        for node in self.order:
            one, times = self.predictions.get(node.name), self.times[node.name]
            if one is None or one.memory is None or node.placement is None or node.placement.executor not in HERE:
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

    def breaking(self, room: int) -> tuple[str, int] | None:
        """The stage with which more than so many bytes are wanted on one device (or of a machine without GPUs), and how
        many; None: it is never more."""
        peak, stage = max(self.memory.values(), default=(0, ""))
        return (stage, peak) if peak > room else None

    @functools.cached_property
    def idle(self) -> dict[str, float]:
        """By pool ("": devices of none) the share of the time in which its devices are no stage's."""
        lines: dict[str, list[tuple[Node, int]]] = {}
        for node in self.order:
            if (count := self.devices_of(node)) and node.placement is not None and node.placement.executor in HERE:
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
        """The stages that the end has waited for, from the beginning on: each began when the one before had ended,
        because it reads what that one made or because it needed its devices."""
        nodes = {node.name: node for node in self.order}
        found: list[PathStep] = []
        name = max(self.times, key=lambda name: self.times[name].end, default=None)
        while name is not None:
            node, times = nodes[name], self.times[name]
            before = [need for need in node.needs if need in self.times and self.times[need].end <= times.asked]
            last = max(before, key=lambda need: self.times[need].end, default=None)
            ready = self.times[last].end if last is not None else 0.0
            why = "inputs" if last is not None else "nothing"
            freed = max(
                (
                    other
                    for other, theirs in self.times.items()
                    if ready < theirs.end <= times.asked and self._share(node, nodes[other])
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

    def _share(self, one: Node, other: Node) -> bool:
        places = one.placement, other.placement
        if places[0] is None or places[1] is None or places[0].executor != places[1].executor:
            return False
        return bool(places[0].bits & places[1].bits)

    @functools.cached_property
    def path_by_kind(self) -> dict[str, float]:
        """Seconds of `path` by what stages are for (their role; of rounds and held-out answers its last part)."""
        nodes = {node.name: node for node in self.order}
        found: dict[str, float] = {}
        for step in self.path:
            kind = kind_of(nodes[step.stage])
            found[kind] = found.get(kind, 0.0) + step.seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))


HOST = Placement("", (-1,))
"""Stands for the memory of a machine without GPUs."""


def _peak(stages: list[tuple[float, float, int, str]]) -> tuple[int, str]:
    """The most that these have at the same time, and the one that has most of it then."""
    changes = sorted(
        [(start, 1, size, name) for start, end, size, name in stages if end > start]
        + [(end, 0, size, name) for start, end, size, name in stages if end > start]
    )  # what ends goes before what starts
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
    """What a stage is for, in a word that all iterations share: generation, reward, training."""
    return node.role.rpartition("/")[2] if node.iteration is not None else node.stage.name


def predict_all(graph: Graph, predictor: Predictor) -> dict[str, Prediction]:
    """What is known of the stages of a placed graph; the others are not in it."""
    found = {name: predictor.predict(node, graph) for name, node in graph.nodes.items()}
    return {name: one for name, one in found.items() if one is not None}


def with_queue(predictions: Mapping[str, Prediction], order: Iterable[Node], seconds: float) -> dict[str, Prediction]:
    """The same, with what stages that use devices wait for a scheduler of which nothing else is known."""
    queued = {node.name for node in order if seconds and node.stage.uses_devices(node.config)}
    return {name: replace(one, queue=seconds) if name in queued else one for name, one in predictions.items()}


def simulate(
    order: Sequence[Node],
    cluster: Cluster,
    predictions: Mapping[str, Prediction],
    surroundings: Surroundings = Surroundings(),
    *,
    bound: bool = False,
) -> Simulation:
    """Run the stages of a placed graph in advance, each in the time that is predicted for it.

    Args:
        order: the stages, the most urgent first (`scheduling.in_order`).
        cluster: what they are placed on.
        predictions: what each takes, by name.
        surroundings: what else decides.
        bound: let stages that nothing is known of take no time, and call what comes out a bound.

    Raises:
        UserError: nothing is known of a stage, and no bound is asked for.
    """
    unknown = tuple(node.name for node in order if node.name not in predictions)
    if unknown and not bound:
        raise UserError(f"how long the run takes cannot be said: {unknown_in_words(unknown)}")
    works = {name: StageWork(0.0) for name in unknown}
    for name, one in predictions.items():
        demand = surroundings.demands.get(name, 0.0)
        works[name] = StageWork(one.seconds, one.queue, demand, finish=one.finish)
    times = surroundings.course(order, cluster, works)
    return Simulation(order, cluster, predictions, times, surroundings, unknown)


def gains(simulation: Simulation, faster: float = 0.1) -> dict[str, float]:
    """By kind of stage the share of the run's time that is spared where they take a tenth less; the largest first.

    Those are the bottleneck on which most of the run waits: what has time to spare gains nothing.
    """
    nodes = {node.name: node for node in simulation.order}
    found = {}
    for kind in dict.fromkeys(kind_of(node) for node in simulation.order):
        less = {
            name: one.faster(faster) if kind_of(nodes[name]) == kind else one
            for name, one in simulation.predictions.items()
        }
        other = simulate(simulation.order, simulation.cluster, less, simulation.surroundings, bound=True)
        found[kind] = 1 - other.total / simulation.total if simulation.total else 0.0
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def unknown_in_words(unknown: Sequence[str]) -> str:
    """What has to be done to know what some stages take."""
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    return (
        f"nothing is known of what {', '.join(unknown[:SHOWN])}{more} take{'s' * (len(unknown) == 1)}. Run the stage "
        "once (every run leaves what its stages took), or give its model's shape and its data, of which an estimate "
        "can be made."
    )


def contention(
    order: Iterable[Node], cluster: Cluster, threads: int | Callable[[Node], int]
) -> tuple[dict[str, float], float]:
    """How much stages use of what they share, and how much there is of it.

    On a machine without GPUs: its cores, of which each process of a stage without cores of its own uses as many as it
    has threads. On one with GPUs, where several stages may have all of them at once (`executor.parallel`): the GPUs.
    """
    if cluster.is_divided:
        return {}, math.inf
    here = [node for node in order if node.placement is None or node.placement.executor in HERE]
    if not cluster.gpus:
        each = threads if callable(threads) else lambda _: threads
        uses = {node.name: float(each(node) * node.stage.layout(node.config).processes) for node in here}
        return uses, float(cluster.cores)
    if cluster.parallel == 1:
        return {}, math.inf
    return {node.name: 1.0 for node in here if node.stage.uses_devices(node.config)}, 1.0
