"""A run in advance: times, memory, what stands idle, what it waits for; and what is refused because nobody knows it."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_pipelines_strategies import machine

from contracts.config import validate
from contracts.errors import UserError
from pipelines.config.cluster import MachinesSection, read_machines
from pipelines.config.load import load_run_config
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Node
from pipelines.insight.driver_time import driver_costs
from pipelines.insight.gantt import picture
from pipelines.insight.simulation_view import as_json, in_sentences, view_simulation
from pipelines.iteration import build_graph
from pipelines.planning.cluster import Cluster, cluster_of_machines
from pipelines.planning.draws import Draws, draw_runs, resume_interval
from pipelines.planning.placement import place
from pipelines.planning.prediction import Prediction
from pipelines.planning.scheduling import StageWork, schedule, simulate_schedule, start_order, streams
from pipelines.planning.search.evaluation import ExpectedRun
from pipelines.planning.simulation import (
    DriverCosts,
    ScheduleConditions,
    Simulation,
    contention,
    predict_all,
    sensitivities,
    simulate,
    with_queue,
)
from pipelines.run.events import RunStarted, StageFailed, StagePublished, StageStarted

GIB = 1 << 30
SECONDS = {"generation": 60.0, "reward": 20.0, "reference": 20.0, "training": 100.0}


class Known:
    """Predicts what stages of a role take, as often measured; nothing of the others but that they are short."""

    def __init__(self, seconds: Mapping[str, float] = SECONDS, *, short: float = 0.0, gib: float = 10) -> None:
        self.seconds, self.short, self.gib = seconds, short, gib

    def predict(self, node: Node, graph: Graph) -> Prediction:
        """Nine tenths of it computing."""
        own = self.seconds.get(node.role, self.short)
        memory = int(self.gib * GIB) if node.role in self.seconds else None
        return Prediction(0.9 * own, 0.05 * own, 0.025 * own, 0.025 * own, 0.0, memory, "measured", 0.1, "test")


def planned(path: Path, plan: Any, gpus: int = 4, iterations: int = 2, *more: str) -> tuple[RunConfig, Cluster, Graph]:
    config = load_run_config(path, ["training.algorithm=dpo", f"placement={plan}", *more])
    cluster = machine(plan, gpus)
    return config, cluster, place(build_graph(config, iterations), cluster)


def simulated(path: Path, plan: Any, *more: str, known: Known | None = None, **options: Any) -> Simulation:
    config, cluster, graph = planned(path, plan, 4, 2, *more)
    found = predict_all(graph, known or Known())
    conditions = ScheduleConditions(streams=streams(graph, config), **options)
    return simulate(start_order(graph, config), cluster, found, conditions)


def test_it_says_what_the_plan_says_of_the_same_durations(shared_smallest: Path) -> None:
    config, cluster, graph = planned(shared_smallest, "interleaving")
    predictions = predict_all(graph, Known())
    order = start_order(graph, config)
    found = simulate(order, cluster, predictions)
    times = schedule(order, cluster, {name: one.seconds for name, one in predictions.items()})
    assert {name: (one.start, one.end) for name, one in found.times.items()} == times
    assert found.total == max(end for _, end in times.values())


def test_the_way_to_the_end_has_no_gap_and_is_told_by_kind(shared_smallest: Path) -> None:
    found = simulated(shared_smallest, "separation")
    assert sum(step.seconds for step in found.path) == pytest.approx(found.total)
    assert sum(found.path_by_kind.values()) == pytest.approx(found.total)
    assert next(iter(found.path_by_kind)) == "training"
    assert sum(found.iterations) <= found.total
    assert len(found.iterations) == 2


def test_device_seconds_are_held_and_computed_in(shared_smallest: Path) -> None:
    found = simulated(shared_smallest, {"strategy": "separation", "pools": {"generation": 1, "training": 3}})
    assert found.held_seconds == pytest.approx(2 * (60.0 + 20.0 + 20.0 + 3 * 100.0))
    assert found.computing_seconds == pytest.approx(0.9 * found.held_seconds)
    assert found.owned_seconds == pytest.approx(4 * found.total)
    assert found.idle["training"] == pytest.approx(1 - 200.0 / found.total)


def test_memory_on_a_device_is_that_of_the_stages_that_have_it_at_the_same_time(shared_smallest: Path) -> None:
    found = simulated(shared_smallest, "separation", known=Known(gib=50))
    assert {device: peak for device, (peak, _) in found.memory.items()} == dict.fromkeys(range(4), 50 * GIB)
    assert found.exceeding(80 * GIB) is None
    stage, wanted = found.exceeding(40 * GIB) or ("", 0)
    assert wanted == 50 * GIB
    assert stage.rpartition("/")[2] in SECONDS
    crowded = simulated(shared_smallest, "flattening", known=Known(SECONDS | {"heldout/generation": 60.0}, gib=50))
    assert crowded.cluster.parallel == 2
    alone = simulate(crowded.order, replace(crowded.cluster, parallel=1), crowded.predictions)
    assert alone.exceeding(80 * GIB) is None
    assert crowded.exceeding(80 * GIB) is not None, "held-out answers are sampled beside those of the next iteration"
    assert crowded.exceeding(100 * GIB) is None


def test_what_nobody_knows_is_refused_or_a_bound_that_says_so(shared_smallest: Path) -> None:
    config, cluster, graph = planned(shared_smallest, "flattening")
    known = {name: one for name, one in predict_all(graph, Known()).items() if not name.endswith("/training")}
    order = start_order(graph, config)
    with pytest.raises(
        UserError, match="there is no prediction for setup/reward-model/training, iteration-001/training"
    ):
        simulate(order, cluster, known)
    bound = simulate(order, cluster, known, bound=True)
    assert bound.unknown == ("setup/reward-model/training", "iteration-001/training", "iteration-002/training")
    assert bound.total < simulate(order, cluster, predict_all(graph, Known())).total


def test_the_driver_starts_and_takes_note_of_one_stage_after_another(shared_smallest: Path) -> None:
    plain = simulated(shared_smallest, "flattening")
    costly = simulated(shared_smallest, "flattening", driver=DriverCosts(start=1.0, end=0.5))
    assert plain.total + 1.5 * len(plain.path) <= costly.total <= plain.total + 1.5 * len(plain.times)
    first = [one for one in sorted(costly.times.values()) if one.submitted < 4]
    assert all(after.submitted - before.submitted >= 1.0 for before, after in pairwise(first))


def test_stages_that_share_cores_slow_each_other_by_as_much_as_they_want_too_much(shared_smallest: Path) -> None:
    _, _, graph = planned(shared_smallest, "flattening", 0)
    cluster = replace(machine("flattening", 0, 2), parallel=4)
    uses, room = contention(graph.nodes.values(), cluster, threads=1)
    assert room == 2
    nodes = [replace(node, needs=()) for node in list(graph.nodes.values())[:4]]
    works = {node.name: StageWork(10.0, demand=uses[node.name]) for node in nodes}
    assert {one.end for one in simulate_schedule(nodes, cluster, works, room=room).values()} == {20.0}, (
        "four on two cores"
    )
    works[nodes[0].name] = StageWork(4.0, demand=1.0)
    ends = [one.end for one in simulate_schedule(nodes, cluster, works, room=room).values()]
    assert ends == pytest.approx([8.0, 17.0, 17.0, 17.0]), "after 8 s three are left, and each has 2/3 of a core"
    assert contention(nodes, machine("interleaving", 0, 2), 1) == ({}, math.inf), "cores of their own"


def test_a_stage_that_fails_gives_its_devices_back_and_comes_again(shared_smallest: Path) -> None:
    config, cluster, graph = planned(shared_smallest, "flattening")
    order = start_order(graph, config)
    works = {node.name: StageWork(10.0) for node in order}
    before = simulate_schedule(order, cluster, works)
    name = "iteration-001/training"
    works[name] = StageWork(10.0, failures=((4.0, 100.0),))
    after = simulate_schedule(order, cluster, works)
    assert after[name].held == pytest.approx(14.0)
    assert after[name].end >= before[name].start + 114.0
    assert after[name].start == before[name].start
    last = max(one.end for one in after.values()) - max(one.end for one in before.values())
    assert 0 < last <= 104.0


def test_waiting_for_a_scheduler_holds_no_device(shared_smallest: Path) -> None:
    config, cluster, graph = planned(shared_smallest, "flattening")
    order = start_order(graph, config)
    found = simulate_schedule(order, cluster, {node.name: StageWork(10.0, queue=5.0) for node in order})
    for one in found.values():
        assert one.start - one.submitted == pytest.approx(5.0)
        assert one.held == pytest.approx(10.0)


def test_a_job_that_publishes_what_others_made_holds_no_device_and_keeps_later_stages_waiting(
    shared_smallest: Path,
) -> None:
    config, cluster, graph = planned(shared_smallest, {"strategy": "flattening"})
    order = start_order(graph, config)
    alone = simulate(order, cluster, predict_all(graph, Known()))
    known = {
        name: replace(one, finish=30.0) if name == "iteration-001/training" else one
        for name, one in alone.predictions.items()
    }
    found = simulate(order, cluster, known)
    training = found.times["iteration-001/training"]
    assert training.end == alone.times["iteration-001/training"].end + 30.0
    assert training.held == alone.times["iteration-001/training"].held
    assert found.times["iteration-001/heldout/generation"].start >= training.end


def test_what_has_time_to_spare_gains_nothing_by_being_faster(shared_smallest: Path) -> None:
    found = sensitivities(simulated(shared_smallest, "separation"))
    assert next(iter(found)) == "training"
    assert found["training"] == pytest.approx(0.1 * 200 / 400)
    assert found["evaluation"] == 0.0


H100 = {"machines": 2, "gpus": 2, "gpu": "H100-SXM", "price": 3.0}


def machines_of(**more: Any) -> MachinesSection:
    return validate(MachinesSection, {**H100, **more}, "cluster.yaml")


def drawn(simulation: Simulation, config: RunConfig, graph: Graph, seed: int = 0, **more: Any) -> Draws:
    return draw_runs(simulation, graph, config.executor, machines_of(**more), count=60, seed=seed)


def test_runs_that_are_drawn_take_longer_where_more_goes_wrong_and_the_same_seed_draws_the_same(
    shared_smallest: Path,
) -> None:
    config, cluster, graph = planned(shared_smallest, "flattening")
    known = predict_all(graph, Known({role: 60 * time for role, time in SECONDS.items()}))
    certain = {name: replace(one, error=0.0) for name, one in known.items()}
    order = start_order(graph, config)
    sure, unsure = simulate(order, cluster, certain), simulate(order, cluster, known)
    assert set(drawn(sure, config, graph).totals) == {sure.total}
    found = drawn(unsure, config, graph)
    assert found == drawn(unsure, config, graph)
    assert found != drawn(unsure, config, graph, seed=1)
    low, high = found.interval
    assert low < found.median < high
    assert found.median == pytest.approx(unsure.total, rel=0.1)
    slow = drawn(sure, config, graph, stragglers={"share": 0.5, "factor": 2})
    assert sure.total < slow.median < 2 * sure.total
    queued = simulate(order, cluster, with_queue(certain, order, 300.0))
    assert queued.total >= sure.total + 300
    waiting = drawn(queued, config, graph, queue={"seconds": 300, "spread": 0.5})
    assert waiting.totals[0] < queued.total < waiting.totals[-1]
    failing = drawn(sure, config, graph, hours_between_failures=4)
    assert failing.failures > 0.5
    assert failing.totals[-1] > sure.total
    assert failing.held[-1] > sure.held_seconds


def test_a_failed_stage_goes_on_from_its_finished_shards(shared_smallest: Path) -> None:
    config, _cluster, graph = planned(shared_smallest, "flattening", 1)
    generation = graph.nodes["iteration-001/generation"]
    one = Known().predict(generation, graph)
    assert resume_interval(generation, graph, one) == pytest.approx(one.compute / 3), "three shards"
    training = graph.nodes["iteration-001/training"]
    assert resume_interval(training, graph, one) == config.training.checkpoint_seconds


def test_machines_are_one_large_one_and_a_training_knows_in_how_many_its_processes_are(shared_smallest: Path) -> None:
    config = load_run_config(shared_smallest, ["executor=slurm", "placement=flattening"])
    cluster = cluster_of_machines(config, machines_of())
    assert (cluster.gpus, cluster.machines, cluster.parallel) == (4, 2, 1)
    graph = place(build_graph(config, 1), cluster)
    training = graph.nodes["iteration-001/training"]
    assert training.placement is not None
    assert training.placement.devices == (0, 1, 2, 3)
    assert training.stage.layout(training.config).nodes == 2
    halves = replace(cluster, placement=machine("separation").placement)
    half = place(build_graph(config, 1), halves).nodes["iteration-001/training"]
    assert half.placement is not None
    assert half.placement.devices == (2, 3)
    assert half.stage.layout(half.config).nodes == 1, "the second machine alone"


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"machnes": 2}, "Did you mean 'machines'"),
        ({"gpus": 0}, "gpus"),
        ({"queue": {"spread": 0.5}}, "queue.spread is set, but queue.seconds is 0"),
        ({"stragglers": {"factor": 0.5}}, "stragglers.factor"),
        ({"stragglers": 2}, "'stragglers' is 2: it is a section; its keys are factor, share"),
        ({"queue": -1}, "queue.seconds"),
    ],
)
def test_a_clusters_file_is_read_like_every_other(tmp_path: Path, more: Any, complaint: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps({**H100, **more}))
    with pytest.raises(UserError, match=complaint):
        read_machines(path)


def test_a_number_is_short_for_the_seconds_of_the_queue(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps({**H100, "queue": 60}))
    assert read_machines(path).queue.seconds == 60


def test_a_run_that_hardly_ever_ends_has_no_median(shared_smallest: Path) -> None:
    config, cluster, graph = planned(shared_smallest, {"strategy": "flattening"})
    found = simulate(start_order(graph, config), cluster, predict_all(graph, Known()))
    machines = machines_of(hours_between_failures=0.01)
    draws = draw_runs(found, graph, config.executor, machines, count=20, seed=3)
    view = view_simulation(found, graph, config, machines=machines, draws=draws, seed=3)
    said = "\n".join(in_sentences(view))
    assert "THIS RUN IS NOT EXPECTED TO FINISH: of 20 runs drawn (seed 3) 100% stop" in said
    assert "median" not in said
    data = json.loads(as_json(view))
    assert data["finishes"] is False
    assert [data["draws"][key] for key in ("median", "low", "high")] == [None, None, None]


def test_stages_without_devices_keep_none_busy_however_it_is_asked(shared_smallest: Path) -> None:
    config, cluster, graph = planned(shared_smallest, {"strategy": "flattening"})
    order = start_order(graph, config)
    found = simulate(order, cluster, predict_all(graph, Known(short=50.0)))
    (pool,) = view_simulation(found, graph, config, machines=machines_of()).plan.pools
    assert pool.idle == found.idle[""] == ExpectedRun(config.placement, found, {}).idle > 0
    busy = sum(found.predictions[node.name].seconds for node in order if node.stage.uses_devices(node.config))
    assert pool.idle == pytest.approx(1 - busy / (cluster.parallel * found.total))


def test_it_is_said_in_words_with_cost_and_bottleneck_and_what_is_not_known(shared_smallest: Path) -> None:
    config, cluster, graph = planned(shared_smallest, {"strategy": "separation", "pools": {"generation": 3}})
    found = simulate(start_order(graph, config), cluster, predict_all(graph, Known()))
    draws = draw_runs(found, graph, config.executor, None, count=20, seed=3)
    view = view_simulation(found, graph, config, machines=machines_of(), room=8 * GIB, draws=draws, seed=3)
    said = "\n".join(in_sentences(view))
    assert "6.67 min in all; from policy to policy 3.33 min, 3.33 min" in said
    assert "of 20 runs drawn (seed 3) the median takes" in said
    assert f"cost: {3.0 * 4 * 400 / 3600:.2f} USD for all devices until the end" in said
    assert "bottleneck: training. Shares of the critical path: training 50%" in said
    assert "of 8.0 GiB on the fullest device, in " in said
    assert "pool training (3): idle 50%" in said
    assert "runs of similar stages (100%)" in said
    assert "the driver's own time between stages is left out" in said
    data = json.loads(as_json(view))
    assert (data["total"], data["is_bound"], data["iterations"]) == (400.0, False, [200.0, 200.0])
    picture_of_it = picture(view.plan)
    assert "iteration-002/training: 100 s" in picture_of_it
    ElementTree.fromstring(picture_of_it)
    known = {name: one for name, one in found.predictions.items() if not name.endswith("training")}
    bound = view_simulation(simulate(found.order, cluster, known, bound=True), graph, config)
    said = "\n".join(in_sentences(bound))
    assert said.startswith("All times are lower bounds: there is no prediction for setup/reward-model/training")
    assert "at least 3.33 min in all" in said


def test_what_the_driver_takes_is_read_from_the_events_of_a_run() -> None:
    def started(time: float, stage: str, reason: str = "not made yet") -> StageStarted:
        return StageStarted(time=time, stage=stage, reason=reason, key="", attempt="attempt-1")

    events = [
        RunStarted(time=0.0, stages=3, by="test"),
        started(0.25, "a"),
        started(0.5, "b"),
        started(0.9, "c", "follows a"),
        StagePublished(time=10.75, stage="a", key=""),
        started(11.5, "d"),
        StagePublished(time=21.0, stage="b", key=""),
        StageFailed(time=21.5, stage="d", attempt="attempt-1", kind="transient", how="was killed", retry_in=9.0),
        StagePublished(time=22.0, stage="c", key=""),
        started(31.0, "d", "not made yet"),
        StagePublished(time=41.125, stage="d", key=""),
    ]
    took = {"a": 10.0, "b": 20.0, "d": 10.0}
    assert driver_costs(events, took) == DriverCosts(0.5, 0.375), "without pauses, and the mean of what is left"
    assert driver_costs(events) == DriverCosts(0.5, 0.0)
    assert driver_costs(events[:2]) is None
    late = [*events[:5], StagePublished(time=11.0, stage="b", key="")]
    assert driver_costs(late, {"a": 10.0, "b": 10.0}) == DriverCosts(0.25, 0.375), "the end of a kept it from that of b"
