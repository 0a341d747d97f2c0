"""Runs whose stages take a known time, on devices that are there by name only: what overlaps, and what it publishes.

The driver is the real one. The time passes only while it waits, so that nothing depends on what else the machine does;
how near a real run comes to the shortest that is possible, benchmarks/placement.py measures.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_stages import Clock, TimedStages, sleep, without_environments

from contracts.artifacts import Artifact
from pipelines.config.load import load_run_config
from pipelines.execution.driver import Driver
from pipelines.execution.executors.base import Site
from pipelines.job import ENTRY
from pipelines.main import main
from pipelines.planning.cluster import cluster_of
from pipelines.planning.placement import placed_graph
from pipelines.planning.prediction import Prediction
from pipelines.planning.scheduling import schedule, shortest_time, start_order, streams
from pipelines.planning.simulation import DriverCosts, ScheduleConditions, simulate
from pipelines.run.directory import RunDirectory
from pipelines.run.events import StagePublished, StageStarted

PPO = ["training.algorithm=ppo", "training.settings={}", "generation.k=4"]
SECONDS = {"generation": 0.5, "reward": 3.0, "reference": 3.0, "values": 3.0, "training": 0.5}


@dataclass
class Found:
    """What the events of a run say."""

    busy: float
    """Seconds in which a stage ran."""
    planned: float
    """By the plan, for stages that take what these took."""
    shortest: float
    alone: float
    spans: dict[str, tuple[float, float]]
    given: dict[str, list[int] | None]
    digests: dict[str, str]


def drive(
    path: Path,
    *overrides: str,
    recipe: list[str] = PPO,
    iterations: int = 1,
    seconds: dict[str, float] = SECONDS,
    clock: Clock | None = None,
) -> Found:
    """Drive a run of such stages to its end; without a clock they are processes that sleep."""
    config = load_run_config(path, [*recipe, *overrides])
    graph = placed_graph(config, iterations)
    run = RunDirectory(config.run_directory)
    run.claim(config, path, iterations)
    site = Site(run, graph, config, ENTRY)
    driver = Driver(site, [])
    driver.executors._made["local"] = TimedStages(site, seconds, clock.sleep if clock is not None else sleep)
    driver.drive()
    begun: dict[str, StageStarted] = {}
    spans: dict[str, tuple[float, float]] = {}
    for event in run.events():
        if isinstance(event, StageStarted):
            begun[event.stage] = event
        elif isinstance(event, StagePublished):
            spans[event.stage] = (begun[event.stage].time, event.time)
    took = {name: end - since for name, (since, end) in spans.items()}
    times = schedule(start_order(graph, config), cluster_of(config), took)
    return Found(
        busy=covered(spans.values()),
        planned=max(end for _, end in times.values()),
        shortest=shortest_time(graph.nodes.values(), took),
        alone=sum(took.values()),
        spans=spans,
        given={name: event.devices for name, event in begun.items()},
        digests={name: Artifact.open(node.output).manifest.digest for name, node in graph.nodes.items()},
    )


@pytest.fixture(autouse=True)
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    without_environments(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("RATCHET_VARIANT", "auto")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in any of these spans."""
    total, until = 0.0, -math.inf
    for since, end in sorted(spans):
        total += max(0.0, end - max(since, until))
        until = max(until, end)
    return total


def overlap(found: Found, one: str, other: str) -> float:
    """For how long two stages ran at the same time."""
    (since, end), (begin, until) = found.spans[one], found.spans[other]
    return min(end, until) - max(since, begin)


def test_interleaving_overlaps_and_publishes_what_flattening_does(smallest: Path, clock: Clock) -> None:
    plain = drive(smallest, "name=flattening", seconds={}, clock=clock)
    found = drive(smallest, "placement=interleaving", clock=clock)
    assert found.digests == plain.digests
    assert found.busy < (found.shortest + found.alone) / 2, found
    assert overlap(found, "iteration-001/reward", "iteration-001/values") >= 0.5 * SECONDS["values"]
    assert found.given["iteration-001/reward"] == [0, 1]
    assert found.given["iteration-001/training"] == [0, 1, 2, 3]
    assert found.given["iteration-001/experience"] == []
    assert all(devices is None for devices in plain.given.values())


def test_separation_overlaps_as_its_plan_says(smallest: Path, clock: Clock) -> None:
    """An iteration is evaluated while the next one trains: its answers come from devices that no scorer waits for."""
    plan = "placement={strategy: separation, pools: {generation: 2, scoring: 1, training: 1}}"
    found = drive(smallest, plan, iterations=2, seconds={"heldout/generation": 4.0, "training": 4.0}, clock=clock)
    assert found.alone - found.planned > 2.5
    assert found.busy < (found.planned + found.alone) / 2, found
    assert overlap(found, "iteration-001/heldout/generation", "iteration-002/training") > 0
    assert found.given["iteration-001/training"] == [3]
    assert found.given["iteration-001/values"] == [2]


@pytest.mark.parametrize("lag", [1, 2])
def test_with_a_lag_generation_overlaps_training(smallest: Path, clock: Clock, lag: int) -> None:
    seconds = {"generation": 2.5, "reward": 0.2, "reference": 0.2, "training": 3.0}
    asked = {"recipe": [f"lag={lag}"], "iterations": 3}
    plain = drive(smallest, "name=flattening", seconds={}, **asked, clock=clock)  # type: ignore[arg-type]
    plan = "placement={strategy: async, pools: {generation: 2, scoring: 1, training: 1}}"
    found = drive(smallest, plan, seconds=seconds, **asked, clock=clock)  # type: ignore[arg-type]
    assert found.digests == plain.digests
    assert found.busy < (found.shortest + found.alone) / 2, found
    assert overlap(found, "iteration-002/generation", "iteration-001/training") > 1.0
    assert found.given["iteration-002/generation"] == [0, 1]
    assert (found.given["iteration-001/reward"], found.given["iteration-001/training"]) == ([2], [3])


def test_the_plan_may_change_between_two_commands(smallest: Path, clock: Clock) -> None:
    first = drive(smallest, "placement=interleaving", iterations=1, seconds={}, clock=clock)
    plan = "placement={strategy: separation, pools: {training: [0]}}"
    found = drive(smallest, plan, iterations=2, seconds={}, clock=clock)
    assert {name: digest for name, digest in found.digests.items() if name in first.digests} == first.digests
    assert found.given["iteration-001/training"] == [0, 1, 2, 3], "what is published stays"
    assert (found.given["iteration-002/training"], found.given["iteration-002/reward"]) == ([0], [1, 2, 3])


def test_status_and_report_say_which_devices_each_stage_had_and_what_stood_idle(
    smallest: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {"generation": 0.4, "reward": 0.4, "reference": 0.4, "values": 0.4, "training": 0.2}
    drive(smallest, "placement=separation", seconds=seconds, clock=clock)
    run = str(smallest.parent / "runs/smallest")
    assert main(["status", run, "--json"]) == 0
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    training = stages["iteration-001/training"]
    assert (training["pool"], training["devices"]) == ("training", [2, 3])
    assert stages["iteration-001/experience"]["devices"] == []
    assert main(["report", run, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["stages"]}
    assert (rows["iteration-001/training"]["pool"], rows["iteration-001/training"]["given"]) == ("training", [2, 3])
    held = [rows[f"iteration-001/{role}"]["held"] for role in ("reward", "reference", "values")]
    assert max(held) - min(held) >= 0.7, "of three scorers that need one pool the last one waits for two"
    assert report["time"]["held"] >= max(held)
    assert report["time"]["idle"]["training"] > 0.5
    told = " ".join(detail for statement in report["statements"] for detail in statement["details"])
    assert "The devices of the pool training were idle for" in told
    page = (smallest.parent / "page.html").absolute()
    assert main(["report", run, "--output", str(page)]) == 0
    assert "<small>training 2-3</small>" in page.read_text()


@pytest.mark.parametrize(
    ("plan", "recipe"),
    [
        ("placement={strategy: separation, pools: {generation: 3}}", PPO),
        ("placement={strategy: separation, pools: {generation: 1, scoring: 2, training: 1}, streaming: true}", []),
        ("placement={strategy: async, pools: {generation: 2, scoring: 1, training: 1}}", ["lag=1"]),
    ],
    ids=["separation", "streaming", "async"],
)
def test_a_simulation_has_the_order_of_the_run_and_about_its_length(
    smallest: Path, clock: Clock, plan: str, recipe: list[str]
) -> None:
    seconds = {"generation": 0.8, "reward": 0.7, "reference": 0.5, "values": 0.6, "training": 1.1, "critic": 0.4}
    config = load_run_config(smallest, [*recipe, plan])
    graph = placed_graph(config, 2)
    told = {
        name: Prediction(seconds.get(node.role, 0.0), 0.0, 0.0, 0.0, 0.0, None, "measured", 0.0, "told")
        for name, node in graph.nodes.items()
    }
    conditions = ScheduleConditions(streams(graph, config), DriverCosts(0.0, 0.0))
    before = simulate(start_order(graph, config), cluster_of(config), told, conditions)
    found = drive(smallest, plan, recipe=recipe, iterations=2, seconds=seconds, clock=clock)
    long = [name for name, node in graph.nodes.items() if seconds.get(node.role)]
    lanes: dict[tuple[int, ...], list[str]] = {}
    for name in long:
        placement = graph.nodes[name].placement
        assert placement is not None
        lanes.setdefault(placement.devices, []).append(name)
    for lane in lanes.values():
        simulated_order = sorted(lane, key=lambda name: before.times[name].start)
        assert simulated_order == sorted(lane, key=lambda name: found.spans[name][0]), plan
    assert found.busy == pytest.approx(before.total, abs=0.1)
    for name in long:
        maker, _ = conditions.streams.get(name, ("", 0.0))
        if maker and before.times[name].start < before.times[maker].end:
            assert found.spans[name][0] < found.spans[maker][1], f"{name} follows {maker} in both"
