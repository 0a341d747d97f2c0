"""How near a simulation comes to what it simulates.

    .venv/bin/python benchmarks/simulation.py --help

Drives runs by plans that nobody has chosen (strategy, pools, streaming, lag, how many stages at once, how long each
stage takes: all drawn by a seed), with the real driver, keys and manifests. The stages are processes that only sleep
(tests/pipelines/small_stages.py), on devices that are there by name only. What the driver itself takes is measured in
runs by other plans, drawn before; nothing else is known of the runs that count but what their stages were told to take.

    measured   from the first stage's start to the last one's end, by the run's events
    simulated  the same of `pipelines.planning.simulation.simulate`
    error      (simulated - measured) / measured
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
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
from pipelines.insight.simulating import simulated  # noqa: E402
from pipelines.job import ENTRY  # noqa: E402
from pipelines.planning.cluster import cluster_of  # noqa: E402
from pipelines.planning.placement import placed_graph  # noqa: E402
from pipelines.planning.prediction import Prediction  # noqa: E402
from pipelines.planning.scheduling import in_order, streams  # noqa: E402
from pipelines.planning.simulation import DriverCosts, Surroundings, predict_all, simulate  # noqa: E402
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
    """A plan that nobody has chosen."""

    recipe: str
    strategy: str
    pools: str
    streaming: bool
    parallel: int
    iterations: int
    seconds: dict[str, float]
    """Of each stage of a role."""
    others: float
    """Of each stage of another role: long enough for the order of stages not to be a matter of milliseconds."""

    @property
    def overrides(self) -> list[str]:
        """For the command line."""
        placement = f"{{strategy: {self.strategy}, pools: {self.pools}, streaming: {str(self.streaming).lower()}}}"
        parallel = [f"executor.parallel={self.parallel}"] if self.strategy == "flattening" else []
        return [*RECIPES[self.recipe], f"placement={placement}", *parallel]


@dataclass(frozen=True)
class Compared:
    """A run, and what was said of it before."""

    plan: DrawnPlan
    stages: int
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        """As a share of what was measured."""
        return (self.simulated - self.measured) / self.measured


class Told:
    """Predicts that stages take what they are told to."""

    def __init__(self, plan: DrawnPlan) -> None:
        self._plan = plan

    def predict(self, node: Node, graph: Graph) -> Prediction:
        """It is all computing."""
        seconds = self._plan.seconds.get(node.role, self._plan.others)
        return Prediction(seconds, 0.0, 0.0, 0.0, 0.0, None, "measured", 0.0, "told")


def draw_plan(chance: random.Random, scale: float) -> DrawnPlan:
    """Draw one."""
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
    """Run it."""
    config = load_run_config(write_smallest(folder), plan.overrides)
    graph = placed_graph(config, plan.iterations)
    run = RunDirectory(config.run_directory)
    run.claim(config, folder / "smallest.yaml", plan.iterations)
    driver = Driver(Site(run, graph, config, ENTRY), [])
    told = Told(plan)
    seconds = {node.role: told.predict(node, graph).seconds for node in graph.nodes.values()}
    driver.executors._made["local"] = TimedStages(driver.executors.site, seconds)
    driver.drive()
    return run.events(), graph, config


def span(events: list[Event]) -> float:
    """Seconds from the first stage's start to the last one's end."""
    starts = [event.time for event in events if isinstance(event, StageStarted)]
    return max(event.time for event in events if isinstance(event, StagePublished)) - min(starts)


def compare(folder: Path, plan: DrawnPlan, driver: DriverCosts) -> Compared:
    """Simulate a plan, then run it."""
    config = load_run_config(write_smallest(folder), plan.overrides)
    graph = placed_graph(config, plan.iterations)
    predictions = predict_all(graph, Told(plan))
    order = in_order(graph, config)
    found = simulate(order, cluster_of(config), predictions, Surroundings(streams(graph, config), driver))
    began = min(times.asked for times in found.times.values())
    events, *_ = drive(folder, plan)
    return Compared(plan, len(order), span(events), found.total - began)


def measure_driver(plans: list[DrawnPlan]) -> DriverCosts:
    """What the driver takes between stages, by runs of these plans."""
    found = []
    for plan in plans:
        with tempfile.TemporaryDirectory() as folder:
            events, graph, _ = drive(Path(folder), plan)
        told = Told(plan)
        own = {name: told.predict(node, graph).seconds for name, node in graph.nodes.items()}
        found.append(driver_costs(events, own))
    costs = [one for one in found if one is not None]
    return DriverCosts(statistics.mean(one.start for one in costs), statistics.mean(one.end for one in costs))


def real_stages(recipe: str, iterations: int, runs: int) -> list[tuple[float, float]]:
    """Runs of a recipe with its real stages, each predicted before from what those before it have left."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RATCHET_PROFILES"] = f"{folder}/profiles"
        for number in range(runs):
            overrides = [f"directory={folder}/{number}"]
            plan = plan_run(recipe, overrides, iterations, download=False)
            before = [RunDirectory(Path(folder, f"{number - 1}", plan.config.name))] if number else []
            view = simulated(plan, None, before, draws=1)
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
            measured = span(events)
            took = {event.stage: event.seconds for event in events if isinstance(event, StagePublished)}
            known = ", ".join(f"{basis} {share:.0%}" for basis, share in view.known_by.items())
            print(
                f"run {number}: measured {measured:6.1f} s, simulated {view.total:6.1f} s, error "
                f"{(view.total - measured) / measured:+.1%}; known by {known}; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            for name, seconds in took.items():
                if name in view.predictions:
                    one = view.predictions[name]
                    print(f"    {name:<40} took {seconds:6.1f} s, predicted {one.seconds:6.1f} s ({one.basis})")
            found.append((measured, view.total))
    return found


def rank_correlation(pairs: list[tuple[float, float]]) -> float:
    """Spearman's."""
    ranks = []
    for values in zip(*pairs, strict=True):
        order = sorted(range(len(values)), key=values.__getitem__)
        ranks.append([order.index(number) for number in range(len(values))])
    return statistics.correlation(*ranks)


def main() -> int:
    """Print a line for each plan, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--before", type=int, default=3, help="plans by which the driver is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="how much longer the stages take")
    parser.add_argument("--recipe", help="its real stages instead, each run predicted from those before it")
    parser.add_argument("--iterations", type=int, default=2, help="of the recipe")
    parser.add_argument("--runs", type=int, default=2, help="of the recipe")
    options = parser.parse_args()
    if options.recipe:
        pairs = real_stages(options.recipe, options.iterations, options.runs)
        errors = [(said - measured) / measured for measured, said in pairs]
        print(json.dumps({"recipe": options.recipe, "errors": errors, "time": time.time()}))
        return 0
    patch = pytest.MonkeyPatch()
    without_environments(patch)
    patch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    patch.setenv("RATCHET_VARIANT", "auto")
    chance = random.Random(options.seed)
    driver = measure_driver([draw_plan(chance, options.scale) for _ in range(options.before)])
    print(f"driver: {driver.start * 1e3:.1f} ms to start a stage, {driver.end * 1e3:.1f} ms at its end", flush=True)
    found = []
    for number in range(options.plans):
        plan = draw_plan(chance, options.scale)
        with tempfile.TemporaryDirectory() as folder:
            line = compare(Path(folder), plan, driver)
        load = os.getloadavg()[0]
        print(
            f"{number:2} {plan.recipe} {plan.strategy:<12} {'streaming' if plan.streaming else '':<9} "
            f"{plan.iterations} iterations, {line.stages:3} stages: measured {line.measured:6.2f} s, "
            f"simulated {line.simulated:6.2f} s, error {line.error:+.1%}, load {load:.1f}",
            flush=True,
        )
        found.append(line)
    worst = max(abs(line.error) for line in found)
    ranks = rank_correlation([(line.measured, line.simulated) for line in found])
    print(json.dumps({"driver": asdict(driver), "worst": worst, "rank_correlation": ranks, "time": time.time()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
