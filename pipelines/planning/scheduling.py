"""Decides which stages start when: the driver's scheduling rule, and a simulation of a run by the same rule."""

import heapq
import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Node, Placement
from pipelines.planning.cluster import Cluster
from pipelines.planning.estimates import GraphOutlook

Device = tuple[str, int]
"""A device: its executor, and its number."""
Streams = Mapping[str, tuple[str, float]]
"""By streaming stage: the name of the stage that it follows, and the share of its own time that remains after that."""
LOCAL = "local"
QUEUED, PAUSED, FINISHING = "queued", "paused", "finishing"
NO_DEVICE = -1
"""The device number of stages without devices."""


class Admission:
    """Decides for one stage after another, the most urgent first, whether it may start next to the running ones.

    Devices that an urgent stage waits for are not given to later ones. Otherwise stages that need few devices could
    delay forever one that needs many.
    """

    def __init__(self, cluster: Cluster, taken: Iterable[Placement] = ()) -> None:
        self._cluster = cluster
        self._max_stages = cluster.executor.parallel if cluster.is_divided else None
        self._stages = 0
        self._taken: dict[str, list[int]] = {}  # by executor; bit d of mask k: more than k stages have device d
        self._reserved: dict[str, int] = {}
        for placement in taken:
            self.take(placement)

    def admits(self, placement: Placement) -> bool:
        """Whether a stage may start now; if so, it takes its devices."""
        limit = self._cluster.sharing_limit(placement)
        if limit is not None:
            taken, reserved = self._taken.get(placement.executor, ()), self._reserved.get(placement.executor, 0)
            barred = reserved | (taken[limit - 1] if limit <= len(taken) else 0)
            if (self._max_stages is not None and self._stages >= self._max_stages) or barred & placement.bits:
                self._reserved[placement.executor] = reserved | placement.bits
                return False
        self.take(placement)
        return True

    def release(self, placement: Placement) -> None:
        """Release the devices of a stage."""
        self._stages -= 1
        bits = placement.bits
        taken = self._taken[placement.executor]
        for number in reversed(range(len(taken))):
            here = taken[number] & bits
            taken[number] ^= here
            bits ^= here

    def reset(self) -> None:
        """Start another pass from the most urgent stage on: drop the reservations of devices for waiting stages."""
        self._reserved.clear()

    def take(self, placement: Placement) -> None:
        self._stages += 1
        bits = placement.bits
        taken = self._taken.setdefault(placement.executor, [])
        for number, had in enumerate(taken):
            taken[number], bits = had | bits, had & bits
        if bits:
            taken.append(bits)


def _devices(placement: Placement) -> list[Device]:
    return [(placement.executor, device) for device in placement.devices or (NO_DEVICE,)]


def start_order(graph: Graph, config: RunConfig) -> list[Node]:
    """The stages, those with the longest chain of dependents first.

    If retention deletes weights after their policy is evaluated, the order is that of the iterations, so that one is
    finished after another.
    """
    return graph.by_urgency() if config.retention.keep == "all" else list(graph.nodes.values())


def streams(graph: Graph, config: RunConfig) -> Streams:
    """The stages that stream from others; after the other stage has ended, the work on its last shard remains."""
    found = {}
    for node in graph.nodes.values() if config.placement.streaming else ():
        producer = graph.streams_from(node)
        if producer is not None:
            answers = GraphOutlook(graph).answers_of(producer.output)
            found[node.name] = (producer.name, 1 / max(1, answers.shards) if answers is not None else 1.0)
    return found


class StageWork(NamedTuple):
    """The time and shared resources that a stage needs."""

    seconds: float
    """Seconds on its devices, if nothing slows it down."""
    queue: float = 0.0
    """Seconds in a scheduler's queue before that."""
    demand: float = 0.0
    """The amount of the shared resource (such as cores) that it uses."""
    failures: tuple[tuple[float, float], ...] = ()
    """Failed attempts before the successful one: seconds until the failure, and seconds of the pause after it."""
    finish: float = 0.0
    """Seconds from the release of its devices until a further job has published the output."""


class StageTimes(NamedTuple):
    """The times of a stage, in seconds from the beginning."""

    submitted: float
    """Time at which the driver starts it."""
    start: float
    """Time at which it gets its devices."""
    end: float
    """Time at which it is published and the driver has seen that."""
    held: float
    """Seconds in which it held its devices: from start to end without the pauses after failed attempts."""


def schedule(
    nodes: Iterable[Node],
    cluster: Cluster,
    seconds: Mapping[str, float],
    running: Collection[str] = (),
    done: Collection[str] = (),
    streams: Streams = MappingProxyType({}),
) -> dict[str, tuple[float, float]]:
    """The start and end of each stage in seconds from now, if all take as long as expected.

    Args:
        nodes: the stages of a placed graph, the most urgent first.
        cluster: the hardware and limits.
        seconds: remaining seconds of each stage.
        running: stages that hold their devices already.
        done: stages that are published.
        streams: stages that start on the shards that another one has finished so far, on devices that are free then.
    """
    nodes = list(nodes)
    works = {node.name: StageWork(seconds[node.name]) for node in nodes if node.name not in done}
    spans = simulate_schedule(nodes, cluster, works, running, streams)
    return {name: (span.start, span.end) for name, span in spans.items()}


def simulate_schedule(
    nodes: Iterable[Node],
    cluster: Cluster,
    works: Mapping[str, StageWork],
    running: Collection[str] = (),
    streams: Streams = MappingProxyType({}),
    *,
    room: float = math.inf,
    start_seconds: float = 0.0,
    end_seconds: float = 0.0,
) -> dict[str, StageTimes]:
    """Simulate a run event by event: the driver's actions, with stages that take the times in `works`.

    Args:
        nodes: the stages of a placed graph, the most urgent first.
        cluster: the hardware and limits.
        works: the remaining work of each stage; stages that are not in it are published.
        running: stages that hold their devices already.
        streams: as for `schedule`.
        room: the amount of the shared resource. If the running stages demand more, all slow down by the same factor.
        start_seconds: time that the driver takes to start a stage, during which it starts no other.
        end_seconds: time that the driver takes to handle the end of a stage.
    """
    left = [node for node in nodes if node.name in works]
    rank = {node.name: number for number, node in enumerate(left)}
    places = [_placement_of(node) for node in left]
    work = [works[node.name] for node in left]
    needs = [[rank[need] for need in node.needs if need in rank] for node in left]
    waiting = [len(own) for own in needs]
    dependents: list[list[int]] = [[] for _ in left]
    for number, own in enumerate(needs):
        for need in own:
            dependents[need].append(number)
    producer = [rank.get(streams[node.name][0]) if node.name in streams else None for node in left]
    followers = [number for number, followed in enumerate(producer) if followed is not None]

    admission = Admission(cluster)
    # Seconds of work that a stage running from the beginning has done by `now`: less than `now` after any slowdown.
    effort = 0.0
    now = 0.0
    rate, demanded = 1.0, 0.0
    ends: list[tuple[float, int]] = []  # ends of attempts, in effort
    timers: list[tuple[float, int, str]] = []  # ends of queueing, of pauses and of finalizing jobs, in time
    idle = [True] * len(left)
    submitted: dict[int, float] = {}
    begun: dict[int, float] = {}
    held = [0.0] * len(left)
    since = [0.0] * len(left)
    reached = [0.0] * len(left)
    failures = [list(one.failures) for one in work]
    at_work: set[int] = set()
    found: dict[str, StageTimes] = {}
    ready: dict[Placement, list[int]] = {}  # heaps: among stages with the same devices the most urgent starts first
    lines = [ready.setdefault(place, []) for place in places]

    def pass_time(seconds: float) -> None:
        nonlocal now, effort
        now += seconds
        effort += seconds * rate

    def demand(more: float) -> None:
        nonlocal demanded, rate
        demanded += more
        rate = min(1.0, room / demanded) if demanded > 0 else 1.0

    def start(number: int) -> None:
        idle[number] = False
        submitted.setdefault(number, now)
        if work[number].queue:
            heapq.heappush(timers, (now + work[number].queue, number, QUEUED))
        else:
            begin(number)

    def begin(number: int) -> None:
        begun.setdefault(number, now)
        since[number] = now
        at_work.add(number)
        if work[number].demand:
            demand(work[number].demand)
        if failures[number]:
            heapq.heappush(ends, (effort + failures[number][0][0], number))
        elif waiting[number] and producer[number] in at_work:  # it streams, and cannot end before its producer does
            followed.setdefault(producer[number], []).append((effort, number))  # type: ignore[arg-type]
        else:
            heapq.heappush(ends, (effort + work[number].seconds, number))

    def end(number: int) -> None:
        at_work.discard(number)
        if work[number].demand:
            demand(-work[number].demand)
        held[number] += now - since[number]
        reached[number] = effort
        pass_time(end_seconds)
        admission.release(places[number])
        if failures[number]:
            _, pause = failures[number].pop(0)
            heapq.heappush(timers, (now + pause, number, PAUSED))
        elif work[number].finish:
            heapq.heappush(timers, (now + work[number].finish, number, FINISHING))
        else:
            publish(number)

    def publish(number: int) -> None:
        name = left[number].name
        found[name] = StageTimes(submitted[number], begun[number], now, held[number])
        for start_effort, follower in followed.pop(number, ()):
            seconds = work[follower].seconds
            least = reached[number] + streams[left[follower].name][1] * seconds
            least = max(least, effort) if work[number].finish else least  # not before its producer is published
            heapq.heappush(ends, (max(start_effort + seconds, least), follower))
        for dependent in dependents[number]:
            waiting[dependent] -= 1
            if not waiting[dependent] and idle[dependent]:
                heapq.heappush(lines[dependent], dependent)

    followed: dict[int, list[tuple[float, int]]] = {}
    for number in sorted((rank[name] for name in running if name in rank), key=lambda one: producer[one] is not None):
        admission.take(places[number])
        start(number)
    for number, count in enumerate(waiting):
        if not count and idle[number]:
            heapq.heappush(lines[number], number)
    while True:
        admission.reset()
        fronts = [(line[0], place) for place, line in ready.items() if line]
        heapq.heapify(fronts)
        while fronts:
            number, place = heapq.heappop(fronts)
            if admission.admits(place):
                heapq.heappop(ready[place])
                pass_time(start_seconds)
                start(number)
                if ready[place]:
                    heapq.heappush(fronts, (ready[place][0], place))
        for number in followers:
            one = producer[number]
            can_follow = idle[number] and waiting[number] == 1 and one in at_work and not waiting[one]
            if can_follow and admission.admits(places[number]):
                pass_time(start_seconds)
                start(number)
        if not ends and not timers:
            return found
        if not ((ends and ends[0][0] <= effort) or (timers and timers[0][0] <= now)):  # advance to the next event
            until = now + (ends[0][0] - effort) / rate if ends else math.inf
            if timers and timers[0][0] < until:
                effort += (timers[0][0] - now) * rate
                now = timers[0][0]
            else:
                now = ends[0][0] if now == effort and rate == 1.0 else until
                effort = ends[0][0]
        while timers and timers[0][0] <= now:
            _, number, what = heapq.heappop(timers)
            if what == QUEUED:
                begin(number)
            elif what == FINISHING:
                publish(number)
            else:
                idle[number] = True
                if not waiting[number]:
                    heapq.heappush(lines[number], number)
        while ends and ends[0][0] <= effort:
            end(heapq.heappop(ends)[1])


def _placement_of(node: Node) -> Placement:
    """The placement of a stage. A stage is not placed if another machine has its devices; then one local device is
    assumed."""
    return node.placement or Placement(LOCAL, (0,))


def critical_path(
    nodes: Iterable[Node], seconds: Mapping[str, float], streams: Streams = MappingProxyType({})
) -> list[str]:
    """The longest chain of dependent stages; no schedule with these durations is shorter.

    Args:
        nodes: the stages, each after those that it needs.
        seconds: seconds of each stage; stages that are not in it are done.
        streams: as for `schedule`.
    """
    ends, before = _earliest(nodes, seconds, streams)
    path: list[str] = []
    name = max(ends, key=ends.__getitem__, default=None)
    while name is not None:
        path.append(name)
        name = before[name]
    return path[::-1]


def _earliest(
    nodes: Iterable[Node], seconds: Mapping[str, float], streams: Streams
) -> tuple[dict[str, float], dict[str, str | None]]:
    """The end of each stage if none ever waits for devices, and the stage that it waited for last."""
    starts: dict[str, float] = {}
    ends: dict[str, float] = {}
    before: dict[str, str | None] = {}
    for node in nodes:
        name = node.name
        if name not in seconds:
            continue
        producer, share = streams.get(name, ("", 0.0))
        known = [need for need in node.needs if need in ends and need != producer]
        last = max(known, key=ends.__getitem__, default=None)
        start = ends[last] if last is not None else 0.0
        end = start + seconds[name]
        if producer in ends:
            start = max(start, starts[producer])
            end = start + seconds[name]
            if ends[producer] + share * seconds[name] >= end or last is None or starts[producer] >= ends[last]:
                last = producer
            end = max(end, ends[producer] + share * seconds[name])
        starts[name], ends[name], before[name] = start, end, last
    return ends, before


def shortest_time(
    nodes: Iterable[Node], seconds: Mapping[str, float], streams: Streams = MappingProxyType({})
) -> float:
    """A lower bound of a run's time in any order: the longer of the critical path and the most work of one device."""
    nodes = list(nodes)
    work: dict[Device, float] = {}
    for node in nodes:
        placement = _placement_of(node)
        if placement.exclusive and placement.devices:
            for device in _devices(placement):
                work[device] = work.get(device, 0.0) + seconds.get(node.name, 0.0)
    ends, _ = _earliest(nodes, seconds, streams)
    return max([*ends.values(), *work.values()], default=0.0)
