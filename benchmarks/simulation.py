"""Measures the error of simulated run times.

    .venv/bin/python benchmarks/simulation.py --help
    .venv/bin/python benchmarks/simulation.py --seed 3                                   # 20 drawn plans
    .venv/bin/python benchmarks/simulation.py --recipe quickstart --iterations 2         # a recipe's real stages
    .venv/bin/python benchmarks/simulation.py --recipe smollm2 --iterations 2 key=value  # with keys of its config

Drives runs with random plans (strategy, pools, streaming, lag, number of parallel stages and stage durations are drawn
from a seed), with the real driver, keys and manifests. The stages are processes that only sleep
(tests/pipelines/small_stages.py), on devices that exist only by name. The driver's own costs are measured in the
--before previous runs; apart from these, the simulation knows only the durations that the stages were given.

    measured   time from the first stage's start to the last one's end, by the run's events
    simulated  the same time in `pipelines.planning.simulation.simulate`
    error      (simulated - measured) / measured

With --recipe the stages are real. The first run is predicted from data sheets alone, each later one from the previous
runs, as a whole and from policy to policy. The exit code is 1 if the error of the last run, or of one of its
iterations, exceeds --within; for random plans, if any error exceeds 5 %.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/pipelines")]

import pytest  # noqa: E402
from pipelines_smallest import write_smallest  # noqa: E402
from small_stages import TimedStages, without_environments  # noqa: E402

from pipelines.config.load import load_run_config  # noqa: E402
from pipelines.execution.driver import Driver  # noqa: E402
from pipelines.execution.executors.base import Site  # noqa: E402
from pipelines.graph import Graph, Node  # noqa: E402
from pipelines.insight.driver_time import driver_costs  # noqa: E402
from pipelines.insight.plan_simulation import simulate_plan  # noqa: E402
from pipelines.job import ENTRY  # noqa: E402
from pipelines.planning.cluster import cluster_of  # noqa: E402
from pipelines.planning.placement import placed_graph  # noqa: E402
from pipelines.planning.prediction import Prediction  # noqa: E402
from pipelines.planning.scheduling import start_order, streams  # noqa: E402
from pipelines.planning.simulation import DriverCosts, ScheduleConditions, predict_all, simulate  # noqa: E402
from pipelines.run.directory import RunDirectory  # noqa: E402
from pipelines.run.events import Event, StagePublished, StageStarted  # noqa: E402
from pipelines.run.plan import plan_run  # noqa: E402

RECIPES = {
    "dpo": [],
    "ppo": ["training.algorithm=ppo", "training.settings={}", "generation.k=4"],
    "lag": ["lag=1"],
}
ROLES = ("generation", "reward", "reference", "values", "training", "critic", "heldout/generation", "heldout/reward")
POOLS = {
    "separation": ["{}", "{generation: 3}", "{generation: 2, scoring: 1, training: 1}", "{training: [0]}"],
    "async": ["{}", "{generation: 2, scoring: 1, training: 1}", "{generation: 1, training: 3}"],
}


@dataclass(frozen=True)
class DrawnPlan:
    """A random plan."""

    recipe: str
    strategy: str
    pools: str
    streaming: bool
    parallel: int
    iterations: int
    seconds: dict[str, float]
    """Stage durations by role."""
    others: float
    """The duration of stages of other roles: long enough that the order of stages does not depend on milliseconds."""

    @property
    def overrides(self) -> list[str]:
        """The config overrides of the plan."""
        placement = f"{{strategy: {self.strategy}, pools: {self.pools}, streaming: {str(self.streaming).lower()}}}"
        parallel = [f"executor.parallel={self.parallel}"] if self.strategy == "flattening" else []
        return [*RECIPES[self.recipe], f"placement={placement}", *parallel]


@dataclass(frozen=True)
class Compared:
    """The measured and the simulated time of a run."""

    plan: DrawnPlan
    stages: int
    measured: float
    simulated: float
    same_order: bool
    """Whether each device ran its stages in the simulated order; stages that become ready within milliseconds may
    swap."""

    @property
    def error(self) -> float:
        """The error as a share of the measured time."""
        return (self.simulated - self.measured) / self.measured


class GivenDurations:
    """A predictor that returns the durations that the stages were given."""

    def __init__(self, plan: DrawnPlan) -> None:
        self._plan = plan

    def predict(self, node: Node, graph: Graph) -> Prediction:
        """Predict the given duration, all of it as compute time."""
        seconds = self._plan.seconds.get(node.role, self._plan.others)
        return Prediction(seconds, 0.0, 0.0, 0.0, 0.0, None, "measured", 0.0, "told")


def draw_plan(chance: random.Random, scale: float) -> DrawnPlan:
    """Draw a random plan."""
    recipe = chance.choice(list(RECIPES))
    strategy = "async" if recipe == "lag" else chance.choice(["flattening", "interleaving", "separation"])
    return DrawnPlan(
        recipe=recipe,
        strategy=strategy,
        pools=chance.choice(POOLS.get(strategy, ["{}"])),
        streaming=strategy != "flattening" and chance.random() < 0.5,
        parallel=chance.choice([1, 2, 3]),
        iterations=chance.choice([1, 2, 3]),
        seconds={role: round(scale * chance.uniform(0.2, 2.0), 2) for role in ROLES},
        others=0.15 * scale,
    )


def drive(folder: Path, plan: DrawnPlan) -> tuple[list[Event], Graph, Any]:
    """Run a plan with stages that sleep."""
    config = load_run_config(write_smallest(folder), plan.overrides)
    graph = placed_graph(config, plan.iterations)
    run = RunDirectory(config.run_directory)
    run.claim(config, folder / "smallest.yaml", plan.iterations)
    driver = Driver(Site(run, graph, config, ENTRY), [])
    durations = GivenDurations(plan)
    seconds = {node.role: durations.predict(node, graph).seconds for node in graph.nodes.values()}
    driver.executors._made["local"] = TimedStages(driver.executors.site, seconds)
    driver.drive()
    return run.events(), graph, config


def span(events: list[Event]) -> float:
    """The seconds from the first stage's start to the last one's end."""
    starts = [event.time for event in events if isinstance(event, StageStarted)]
    return max(event.time for event in events if isinstance(event, StagePublished)) - min(starts)


def compare(folder: Path, plan: DrawnPlan, driver: DriverCosts) -> tuple[Compared, DriverCosts]:
    """Simulate a plan, then run it. Also returns the driver's costs in this run."""
    config = load_run_config(write_smallest(folder), plan.overrides)
    graph = placed_graph(config, plan.iterations)
    predictions = predict_all(graph, GivenDurations(plan))
    order = start_order(graph, config)
    found = simulate(order, cluster_of(config), predictions, ScheduleConditions(streams(graph, config), driver))
    began = min(times.submitted for times in found.times.values())
    events, *_ = drive(folder, plan)
    costs = driver_costs(events, {name: one.seconds for name, one in predictions.items()})
    assert costs is not None, "a run has stages"
    starts = {event.stage: event.time for event in events if isinstance(event, StageStarted)}
    simulated_order = stages_by_device(order, {name: times.start for name, times in found.times.items()})
    same_order = simulated_order == stages_by_device(order, starts)
    return Compared(plan, len(order), span(events), found.total - began, same_order), costs


def stages_by_device(order: Sequence[Node], starts: Mapping[str, float]) -> dict[tuple[int, ...], list[str]]:
    """The stages of each group of devices, ordered by their starts."""
    found: dict[tuple[int, ...], list[str]] = {}
    for node in sorted(order, key=lambda node: starts[node.name]):
        if node.placement is not None and node.placement.devices:
            found.setdefault(node.placement.devices, []).append(node.name)
    return found


def mean_costs(costs: Sequence[DriverCosts]) -> DriverCosts:
    """The mean costs of several runs."""
    return DriverCosts(statistics.fmean(one.start for one in costs), statistics.fmean(one.end for one in costs))


def policies(events: list[Event]) -> list[float]:
    """The seconds from one policy to the next; the first value counts from the first stage's start."""
    start = min(event.time for event in events if isinstance(event, StageStarted))
    ends = [
        event.time - start
        for event in events
        if isinstance(event, StagePublished) and re.fullmatch(r"iteration-\d+/training", event.stage)
    ]
    return [end - before for before, end in itertools.pairwise([0.0, *sorted(ends)])]


@dataclass(frozen=True)
class RealRun:
    """The times of a run with real stages, in seconds: the whole run, then from policy to policy."""

    measured: list[float]
    simulated: list[float]

    @property
    def errors(self) -> list[float]:
        """The errors as shares of the measured times."""
        return [(guess - real) / real for real, guess in zip(self.measured, self.simulated, strict=True)]


def real_stages(recipe: str, keys: list[str], iterations: int, runs: int) -> list[RealRun]:
    """Run a recipe several times with its real stages, and predict each run from the previous ones before it starts."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RATCHET_PROFILES"] = f"{folder}/profiles"
        for number in range(runs):
            overrides = [*keys, f"directory={folder}/{number}"]
            plan = plan_run(recipe, overrides, iterations, download=False)
            before = [RunDirectory(Path(folder, f"{number - 1}", plan.config.name))] if number else []
            view = simulate_plan(plan, None, before, draws=1)
            command = [
                sys.executable,
                "-m",
                "pipelines",
                "run",
                recipe,
                "--iters",
                str(iterations),
                "--quiet",
                *overrides,
            ]
            subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
            events = RunDirectory(plan.config.run_directory).events()
            run = RealRun([span(events), *policies(events)], [view.total, *view.iterations])
            took = {event.stage: event.seconds for event in events if isinstance(event, StagePublished)}
            known = ", ".join(f"{basis} {share:.0%}" for basis, share in view.known_by.items())
            print(
                f"run {number}: measured {run.measured[0]:6.1f} s, simulated {run.simulated[0]:6.1f} s, error "
                f"{run.errors[0]:+.1%}; known by {known}; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            for policy in range(1, len(run.measured)):
                print(
                    f"    to policy {policy}: measured {run.measured[policy]:6.1f} s, simulated "
                    f"{run.simulated[policy]:6.1f} s, error {run.errors[policy]:+.1%}"
                )
            for name, seconds in took.items():
                if name in view.predictions:
                    one = view.predictions[name]
                    print(f"    {name:<40} took {seconds:6.1f} s, predicted {one.seconds:6.1f} s ({one.basis})")
            found.append(run)
    return found


def rank_correlation(pairs: list[tuple[float, float]]) -> float:
    """Spearman's rank correlation."""
    ranks = []
    for values in zip(*pairs, strict=True):
        order = sorted(range(len(values)), key=values.__getitem__)
        ranks.append([order.index(number) for number in range(len(values))])
    return statistics.correlation(*ranks)


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--before", type=int, default=3, help="previous runs that measure the driver's costs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the durations")
    parser.add_argument("--recipe", help="run this recipe's real stages, each run predicted from the previous ones")
    parser.add_argument("--iterations", type=int, default=2, help="iterations of the recipe")
    parser.add_argument("--runs", type=int, default=2, help="runs of the recipe")
    parser.add_argument("--within", type=float, default=0.1, help="allowed error of the last run, as a share")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe's config")
    options = parser.parse_args()
    if options.recipe:
        found = real_stages(options.recipe, options.overrides, options.iterations, options.runs)
        errors = [run.errors for run in found]
        print(json.dumps({"recipe": options.recipe, "errors": errors, "time": time.time()}))
        return int(max(map(abs, errors[-1])) > options.within)
    return drawn_plans(options)


def drawn_plans(options: argparse.Namespace) -> int:
    """Compare random plans; print a line for each, and one JSON object. Returns the exit code."""
    patch = pytest.MonkeyPatch()
    without_environments(patch)
    patch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    patch.setenv("RATCHET_VARIANT", "auto")
    chance = random.Random(options.seed)
    found: list[Compared] = []
    costs: list[DriverCosts] = []
    for number in range(-options.before, options.plans):
        plan = draw_plan(chance, options.scale)
        driver = mean_costs(costs[-options.before :]) if costs else DriverCosts()
        with tempfile.TemporaryDirectory() as folder:
            line, cost = compare(Path(folder), plan, driver)
        costs.append(cost)
        took = f"driver {cost.start * 1e3:.1f} and {cost.end * 1e3:.1f} ms, load {os.getloadavg()[0]:.1f}"
        if number < 0:
            print(f"before: {took}", flush=True)
            continue
        print(
            f"{number:2} {plan.recipe} {plan.strategy:<12} {'streaming' if plan.streaming else '':<9} "
            f"{plan.iterations} iterations, {line.stages:3} stages: measured {line.measured:6.2f} s, "
            f"simulated {line.simulated:6.2f} s, error {line.error:+.1%}{'' if line.same_order else ', another order'}"
            f"; {took}",
            flush=True,
        )
        found.append(line)
    worst = max(abs(line.error) for line in found)
    ranks = rank_correlation([(line.measured, line.simulated) for line in found])
    driver = asdict(mean_costs(costs))
    within = sum(abs(line.error) <= 0.05 for line in found)
    print(
        json.dumps(
            {"driver": driver, "within_5_%": within, "worst": worst, "rank_correlation": ranks, "time": time.time()}
        )
    )
    return int(worst > 0.05)


if __name__ == "__main__":
    sys.exit(main())
