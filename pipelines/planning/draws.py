"""Simulates a run many times with random queue times, slow stages, failures and prediction errors.

The prediction error is the same for all stages of a kind in one simulated run: what makes the prediction for one
training wrong makes it wrong for all. Queue times, slow stages and failures are independent; failures occur at a
constant rate per device. A failed stage releases its devices, waits according to `executor.backoff_seconds`, and
continues after the work that it had finished: whole shards, or the last saved training state.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.config.cluster import MachinesSection
from pipelines.config.executor import ExecutorSection, retry_pause
from pipelines.graph import Graph, Node
from pipelines.planning.estimates import GraphOutlook
from pipelines.planning.prediction import Prediction, random_factor
from pipelines.planning.scheduling import StageWork
from pipelines.planning.simulation import Simulation, kind_of

TAIL_SHARE = 0.1
"""Share of the draws below an interval, and of those above it."""
MAX_ATTEMPTS = 1000
"""Maximum number of attempts of a stage in one draw; a stage with more would never end."""


@dataclass(frozen=True)
class Draws:
    """The results of many simulated runs; lists are in ascending order."""

    totals: list[float]
    """Seconds of the run."""
    held: list[float]
    """Device-seconds that stages hold, including those of failed attempts."""
    failures: float
    """Average number of failed attempts per run."""
    stopped: float
    """Share of the runs in which a stage exceeds its retries, so that the user has to restart the command."""

    @property
    def finishes(self) -> bool:
        """Whether most runs end without a restart; otherwise their times are meaningless."""
        return self.stopped <= 0.5

    @property
    def median(self) -> float:
        """The median time of a run, in seconds."""
        return _quantile(self.totals, 0.5)

    @property
    def interval(self) -> tuple[float, float]:
        """The interval in seconds that contains 80 % of the runs."""
        return _quantile(self.totals, TAIL_SHARE), _quantile(self.totals, 1 - TAIL_SHARE)


def _quantile(values: Sequence[float], share: float) -> float:
    position = share * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])


def resume_interval(node: Node, graph: Graph, prediction: Prediction) -> float:
    """Seconds of computation between two points from which a further attempt can resume."""
    saves = getattr(node.config, "checkpoint_seconds", None)
    if saves is not None:
        return float(saves)
    path = node.output if node.workload == "generation" else getattr(node.config, "rollouts", None)
    answers = GraphOutlook(graph).answers_of(path) if path is not None else None
    if answers is None:
        return prediction.compute
    at_once = max(1, node.stage.layout(node.config).processes)
    return prediction.compute / max(1, math.ceil(answers.shards / at_once))


def draw_runs(
    simulation: Simulation,
    graph: Graph,
    executor: ExecutorSection,
    machines: MachinesSection | None,
    *,
    count: int,
    seed: int,
) -> Draws:
    """Simulate a run `count` times.

    Args:
        simulation: the run without random effects.
        graph: its stages.
        executor: how many times, and after what pause, a failed stage is retried.
        machines: the distributions of queue times, slow stages and failures; None: only predictions vary.
        count: the number of runs.
        seed: the seed of the random numbers; the same seed gives the same result.
    """
    rng = random.Random(seed)
    intervals = {node.name: resume_interval(node, graph, one) for node, one in _known(simulation)}
    totals, held, failures, stopped = [], [], 0, 0
    for _ in range(count):
        works = _draw(simulation, executor, machines, intervals, rng)
        times = simulation.conditions.simulate(simulation.order, simulation.cluster, works)
        totals.append(max((one.end for one in times.values()), default=0.0))
        held.append(sum(times[node.name].held * simulation.devices_of(node) for node in simulation.order))
        failures += sum(len(work.failures) for work in works.values())
        stopped += any(len(work.failures) > executor.retries for work in works.values())
    return Draws(sorted(totals), sorted(held), failures / count, stopped / count)


def _known(simulation: Simulation) -> list[tuple[Node, Prediction]]:
    found = ((node, simulation.predictions.get(node.name)) for node in simulation.order)
    return [(node, one) for node, one in found if one is not None]


def _draw(
    simulation: Simulation,
    executor: ExecutorSection,
    machines: MachinesSection | None,
    intervals: Mapping[str, float],
    rng: random.Random,
) -> dict[str, StageWork]:
    """The work of each stage in one run."""
    works = {name: StageWork(0.0) for name in simulation.unknown}
    kind_factors: dict[str, float] = {}
    for node, one in _known(simulation):
        kind = kind_of(node)
        if kind not in kind_factors:
            kind_factors[kind] = random_factor(rng, one.error)
        factor, queue = kind_factors[kind], one.queue
        failures: tuple[tuple[float, float], ...] = ()
        compute, fixed = factor * one.compute, factor * (one.start + one.load)
        handoff = factor * one.handoff
        devices = simulation.devices_of(node)
        if machines is not None and devices:
            if rng.random() < machines.stragglers.share:
                compute *= machines.stragglers.factor
            queue *= math.exp(rng.gauss(0, machines.queue.spread))
            if machines.hours_between_failures is not None:
                mtbf = 3600 * machines.hours_between_failures / devices
                interval = compute * (intervals[node.name] / one.compute if one.compute else 1.0)
                failures, compute = _fail(fixed, compute, handoff, interval, mtbf, executor, rng)
        demand = simulation.conditions.demands.get(node.name, 0.0)
        works[node.name] = StageWork(fixed + compute + handoff, queue, demand, failures, one.finish)
    return works


def _fail(
    fixed: float,
    compute: float,
    handoff: float,
    interval: float,
    mtbf: float,
    executor: ExecutorSection,
    rng: random.Random,
) -> tuple[tuple[tuple[float, float], ...], float]:
    """The failed attempts at a stage, each with the seconds until it fails and of the pause after it, and the seconds
    of computation that are left for the last attempt."""
    failures: list[tuple[float, float]] = []
    while (at := rng.expovariate(1 / mtbf)) < fixed + compute + handoff and len(failures) < MAX_ATTEMPTS:
        done = min(compute, max(0.0, at - fixed))
        compute -= done if done == compute else interval * (done // interval) if interval else done
        failures.append((at, retry_pause(len(failures) + 1, executor.backoff_seconds, rng)))
    return tuple(failures), compute
