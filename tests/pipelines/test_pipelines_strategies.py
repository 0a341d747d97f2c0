"""Strategies: who is given which devices, who may run beside whom, and what is refused."""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines_slurm_run import digests
from pipelines_smallest import FinishedRun, pipeline, write_smallest

from contracts.config import Role, validate
from contracts.errors import UserError
from contracts.stage import key_parts, stage_key
from pipelines.config.executor import ExecutorSection
from pipelines.config.load import load_run_config
from pipelines.config.placement import STRATEGIES, PlacementSection
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Placement
from pipelines.iteration import build_graph
from pipelines.planning.cluster import Cluster
from pipelines.planning.placement import place, placed_if_possible
from pipelines.planning.scheduling import critical_path, schedule, shortest_time, start_order, streams
from pipelines.run.directory import RunDirectory
from pipelines.run.events import StageStarted

POOLS = st.dictionaries(st.sampled_from(["generation", "scoring", "training", "mine"]), st.integers(1, 4), max_size=3)
ENTRIES = st.dictionaries(
    st.sampled_from(["reference", "generation", "heldout/*", "iteration-001/*", "scoring"]),
    st.fixed_dictionaries({"layout": st.just({"replicas": 2})}),
    max_size=2,
)
PLANS = st.fixed_dictionaries(
    {"strategy": st.sampled_from(STRATEGIES)}, optional={"pools": POOLS, "stages": ENTRIES, "streaming": st.booleans()}
)
"""What a user, or a planner, may write."""


@pytest.fixture(scope="module")
def config(shared_smallest: Path) -> RunConfig:
    return load_run_config(shared_smallest, ["training.algorithm=ppo", "training.settings={}", "generation.k=4"])


@pytest.fixture(scope="module")
def logical(config: RunConfig) -> Graph:
    return build_graph(config, 2)


def machine(plan: dict[str, Any] | str, gpus: int = 4, cores: int = 8, **executor: Any) -> Cluster:
    section = validate(PlacementSection, plan if isinstance(plan, dict) else {"strategy": plan}, "placement")
    return Cluster(validate(ExecutorSection, executor, "executor"), section, gpus, cores, parallel=2)


def devices(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {name: node.placement.devices for name, node in graph.nodes.items() if node.placement is not None}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=PLANS, gpus=st.integers(0, 8), cores=st.integers(1, 8))
def test_no_plan_changes_a_key_and_each_gives_every_stage_a_place(
    config: RunConfig, logical: Graph, plan: dict[str, Any], gpus: int, cores: int
) -> None:
    cluster = machine(plan, gpus, cores)
    try:
        placed = place(logical, cluster)
    except UserError:
        return
    assert placed.nodes.keys() == logical.nodes.keys()
    here = Path(__file__)
    for name, node in placed.nodes.items():
        before = logical.nodes[name]
        assert (node.needs, node.inputs) == (before.needs, before.inputs)
        for role in (Role.IDENTITY, Role.INPUT):
            assert node.config.select(role) == before.config.select(role), name
        keys = [stage_key(key_parts(one.config, {"torch": "2"}, where=lambda path: here)) for one in (node, before)]
        assert keys[0] == keys[1]
        assert node.placement is not None
        assert set(node.placement.devices) <= set(range(max(1, gpus or (cores if cluster.is_divided else 1))))
        if cluster.is_divided and node.stage.uses_devices(node.config):
            assert node.placement.devices, name
    owners = {node.placement.pool: set(node.placement.devices) for node in placed.nodes.values() if node.placement}
    owners.pop("", None)
    assert not any(one & other for one, other in combinations(owners.values(), 2)), "no two pools have a device"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=PLANS, gpus=st.integers(0, 4), lengths=st.randoms(use_true_random=False), parallel=st.none() | st.just(2))
def test_whatever_the_plan_every_stage_runs_after_its_inputs_and_none_shares_a_device(
    config: RunConfig, logical: Graph, plan: dict[str, Any], gpus: int, lengths: Any, parallel: int | None
) -> None:
    cluster = machine(plan, gpus, parallel=parallel)
    try:
        placed = place(logical, cluster)
    except UserError:
        return
    order = start_order(placed, config)
    times = schedule(order, cluster, {name: lengths.choice((1.0, 2.0, 5.0)) for name in placed.nodes})
    assert times.keys() == placed.nodes.keys()
    for name, node in placed.nodes.items():
        assert all(times[need][1] <= times[name][0] for need in node.needs)
    for one, other in combinations(placed.nodes.values(), 2):
        overlap = min(times[one.name][1], times[other.name][1]) - max(times[one.name][0], times[other.name][0])
        assert one.placement
        assert other.placement
        if one.placement.exclusive and set(one.placement.devices) & set(other.placement.devices):
            assert overlap <= 0, (one.name, other.name)
    if parallel and cluster.is_divided:
        assert max(at_once(times)) <= parallel


def at_once(times: dict[str, tuple[float, float]]) -> Iterator[int]:
    for since, until in times.values():
        yield sum(begin <= since < end for begin, end in times.values() if until > since)


def test_interleaving_gives_scorers_of_the_same_answers_parts_of_the_machine(logical: Graph) -> None:
    given = devices(place(logical, machine("interleaving", gpus=8)))
    everything = tuple(range(8))
    assert given["iteration-001/generation"] == given["iteration-001/training"] == everything
    assert given["iteration-001/critic"] == everything
    parts = [given[f"iteration-001/{role}"] for role in ("reward", "reference", "values")]
    assert parts == [(0, 1, 2), (3, 4, 5), (6, 7)]
    assert given["iteration-001/experience"] == given["prompts/train"] == (), "light stages run beside the others"
    placed = place(logical, machine("interleaving", gpus=8)).nodes
    assert placed["iteration-001/reward"].config.replicas == 3  # type: ignore[attr-defined]
    assert placed["iteration-001/values"].config.replicas == 2  # type: ignore[attr-defined]
    assert placed["iteration-001/generation"].config.replicas == 8  # type: ignore[attr-defined]


def test_scorers_that_are_more_than_the_devices_take_turns(logical: Graph) -> None:
    given = devices(place(logical, machine("interleaving", gpus=2)))
    assert [given[f"iteration-001/{role}"] for role in ("reward", "reference", "values")] == [(0,), (1,), (0,)]


def test_a_scorer_that_needs_another_has_the_whole_machine(shared_smallest: Path) -> None:
    graph = build_graph(load_run_config(shared_smallest, []), 1)
    given = devices(place(graph, machine("interleaving")))
    assert "iteration-001/pairs" in graph.nodes["iteration-001/reference"].needs
    assert given["iteration-001/reward"] == given["iteration-001/reference"] == (0, 1, 2, 3)


@pytest.mark.parametrize("strategy", ["separation", "async"])
def test_separation_halves_the_machine_unless_the_pools_say_how(logical: Graph, strategy: str) -> None:
    given = devices(place(logical, machine(strategy)))
    sampling = {given[f"iteration-001/{role}"] for role in ("generation", "reward", "reference", "values")}
    assert sampling == {(0, 1)}
    assert {given[f"iteration-001/{role}"] for role in ("training", "critic")} == {(2, 3)}
    plan = {"strategy": strategy, "pools": {"generation": 3}}
    assert devices(place(logical, machine(plan)))["iteration-002/training"] == (3,)
    plan = {"strategy": strategy, "pools": {"training": [0], "scoring": 1}, "stages": {"reference": "training"}}
    given = devices(place(logical, machine(plan)))
    assert (given["iteration-001/reward"], given["iteration-001/reference"]) == ((1,), (0,))
    assert given["iteration-001/generation"] == (2, 3), "what is left"


def test_the_cores_are_the_devices_of_a_machine_without_gpus_and_change_no_layout(logical: Graph) -> None:
    placed = place(logical, machine("separation", gpus=0, cores=4))
    assert devices(placed)["iteration-001/generation"] == (0, 1)
    assert devices(placed)["iteration-001/training"] == (2, 3)
    for name, node in place(logical, machine("flattening", gpus=0)).nodes.items():
        assert placed.nodes[name].config == node.config


def test_a_layout_is_taken_by_the_stages_that_have_it(logical: Graph) -> None:
    layout = {"dp": 2, "tp": 2, "micro_batch_tokens": 4096, "gradient_checkpointing": True}
    plan = {"stages": {"*": {"layout": {"replicas": 2}}, "training": {"layout": layout}}}
    placed = place(logical, machine(plan)).nodes
    trained = placed["iteration-001/training"].config.model_dump()
    assert (trained["micro_batch_tokens"], trained["gradient_checkpointing"]) == (4096, True)
    assert placed["iteration-001/critic"].config.model_dump()["gradient_checkpointing"], "it is of the kind training"
    assert placed["iteration-001/generation"].config.replicas == 2  # type: ignore[attr-defined]
    parallel = placed["iteration-001/training"].config.parallel  # type: ignore[attr-defined]
    assert (parallel.dp, parallel.tp) == (2, 2)


def test_a_layout_that_other_settings_of_a_stage_do_not_allow_is_refused(shared_smallest: Path) -> None:
    graph = build_graph(load_run_config(shared_smallest, ["training.lora.rank=2"]), 1)
    with pytest.raises(UserError, match=r"for stage iteration-001/training: layout: lora with parallel\.tp=2"):
        place(graph, machine({"stages": {"training": {"layout": {"tp": 2}}}}))


def test_a_training_over_more_machines_than_there_are_is_refused_and_can_still_be_read_about(
    shared_smallest: Path,
) -> None:
    training = "training.parallel={dp: 3, nodes: 3}"
    graph = build_graph(load_run_config(shared_smallest, [training]), 1)
    for machines, complaint in ((2, "is 3, but there are 2 machines"), (1, "is 3, but it runs on this machine alone")):
        cluster = replace(machine("flattening"), machines=machines)
        with pytest.raises(UserError, match=complaint):
            place(graph, cluster)
        assert placed_if_possible(graph, cluster) is graph


def test_a_schedulers_jobs_go_to_the_partition_and_nodes_of_their_pool(logical: Graph) -> None:
    pools = {"generation": {"partition": "l40s"}, "training": {"partition": "h100", "nodes": "gpu[1-4]"}}
    placed = place(logical, machine({"strategy": "separation", "pools": pools}, kind="slurm")).nodes
    assert placed["iteration-001/reward"].placement == Placement("slurm", (0,), "generation", partition="l40s")
    training = placed["iteration-001/training"].placement
    assert training is not None
    assert (training.partition, training.nodes) == ("h100", "gpu[1-4]")
    assert placed["iteration-001/experience"].placement == Placement("slurm", (0,))


@pytest.mark.parametrize(
    ("plan", "gpus", "complaint"),
    [
        ({"strategy": "separation", "pools": {"generation": 3, "training": 2}}, 4,
         "placement.pools ask for 5 devices up to training, but this machine has 4 GPUs"),
        ({"strategy": "separation", "pools": {"generation": [0, 7]}}, 4,
         "placement.pools.generation has device 7, but this machine has 4 GPUs, counted from 0"),
        ({"strategy": "separation", "pools": {"generation": [3]}}, 0,
         "has device 3, but this machine has 2 cores and no GPU"),
        ("separation", 1, "this machine has 1 GPU, which leaves 1 for generation and training"),
        ({"strategy": "separation", "pools": {"generation": 4}}, 4, "which leaves none for training"),
        ({"strategy": "separation", "pools": {"a": 2, "b": 2}}, 4, "is in none of the pools a, b"),
        ({"pools": {"generation": 1}}, 4, "with placement.strategy=flattening every stage has all devices"),
        ({"strategy": "colocated", "pools": {"generation": 1}}, 4, "with placement.strategy=colocated every stage has"),
        ({"strategy": "separation", "stages": {"training": {"layout": {"dp": 4}}}}, 4,
         "takes 4 GPUs (4 processes of 1), but its pool training has 2"),
        ({"strategy": "interleaving", "stages": {"reward": {"layout": {"replicas": 3}}}}, 3,
         "takes 3 GPUs (3 processes of 1), but its part of the machine has 1"),
        ({"stages": {"training": {"layout": {"tp": 2, "zero": 3}}}}, 4,
         "placement.stages, for stage setup/sft: layout: zero=3 with tp=2"),
        ({"stages": {"training": {"layout": {"zero": 2, "offload": ["param"]}}}}, 4,
         "layout: offload=['param'] with zero=2: only ZeRO-3 offloads weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(logical: Graph, plan: Any, gpus: int, complaint: str) -> None:
    with pytest.raises(UserError) as refusal:
        place(logical, machine(plan, gpus, cores=2))
    assert complaint in str(refusal.value)


def test_an_urgent_stage_that_needs_all_devices_is_not_kept_out_by_those_that_need_few(
    logical: Graph, config: RunConfig
) -> None:
    cluster = machine("interleaving")
    placed = place(logical, cluster)
    seconds = {name: 10.0 if "heldout" in name else 1.0 for name in placed.nodes}
    times = schedule(start_order(placed, config), cluster, seconds)
    first = [times[f"iteration-{number:03d}/training"] for number in (1, 2)]
    ready = max(times[need][1] for need in placed.nodes["iteration-001/training"].needs)
    assert first[0][0] - ready <= 10.0, "one held-out stage at most goes before it"
    assert all(before[1] <= after[0] for before, after in pairwise(first))


def test_a_stage_that_runs_already_keeps_its_devices_and_what_is_done_takes_no_time(
    logical: Graph, config: RunConfig
) -> None:
    cluster = machine("separation")
    placed = place(logical, cluster)
    order = start_order(placed, config)
    done = [node.name for node in order if node.iteration is None or node.iteration == 0]
    seconds = dict.fromkeys(placed.nodes, 2.0)
    times = schedule(order, cluster, seconds, ["iteration-001/generation"], done)
    assert times["iteration-001/generation"] == (0.0, 2.0)
    assert not times.keys() & set(done)


def test_a_scorer_that_follows_is_planned_beside_its_generation(shared_smallest: Path) -> None:
    plan = {"strategy": "separation", "pools": {"generation": 1, "scoring": 1, "training": 1}, "streaming": True}
    config = load_run_config(shared_smallest, [f"placement={plan}"])
    cluster = machine(plan)
    placed = place(build_graph(config, 2), cluster)
    followers = streams(placed, config)
    scorer, generation = "iteration-001/reward", "iteration-001/generation"
    assert followers[scorer] == (generation, pytest.approx(1 / 3)), "three shards"
    assert "iteration-001/pairs" not in followers
    seconds = dict.fromkeys(placed.nodes, 0.0) | {scorer: 6.0, generation: 9.0, "iteration-001/training": 1.0}
    order = start_order(placed, config)
    plain, streamed = schedule(order, cluster, seconds), schedule(order, cluster, seconds, streams=followers)
    assert plain[scorer][0] == plain[generation][1]
    assert streamed[scorer] == (streamed[generation][0], streamed[generation][1] + 2.0)
    assert max(end for _, end in streamed.values()) < max(end for _, end in plain.values())
    on_path = critical_path(placed.nodes.values(), seconds, followers)
    assert on_path.index(scorer) == on_path.index(generation) + 1
    nodes = placed.nodes.values()
    assert shortest_time(nodes, seconds, followers) == pytest.approx(shortest_time(nodes, seconds) - 4.0)
    assert critical_path(nodes, {generation: 9.0}, followers) == [generation], (
        "of what is published nothing is waited for"
    )
    model = "setup/reward-model/training"
    assert critical_path(nodes, {generation: 9.0, model: 100.0, scorer: 6.0}, followers) == [model, scorer]
    done = [name for name in placed.nodes if name.partition("/")[0] != "iteration-001"]
    left = schedule(order, cluster, seconds | {generation: 3.0}, [generation, scorer], done, followers)
    assert left[scorer] == (0.0, 6.0), "what is left of it is longer than what is left of its generation"


@pytest.mark.slow
def test_real_stages_on_cores_of_their_own_publish_what_they_do_on_all(
    tmp_path: Path, finished_run: FinishedRun
) -> None:
    config = write_smallest(tmp_path)
    result = pipeline("run", str(config), "--iters", "1", "placement=separation", "--quiet")
    assert result.returncode == 0, result.stderr
    run = RunDirectory(tmp_path / "runs" / "smallest")
    assert digests(run.path) == digests(finished_run.path, last=1)
    given = {event.stage: event.devices for event in run.events() if isinstance(event, StageStarted)}
    cores = os.cpu_count() or 1
    assert given["iteration-001/generation"] == list(range(-(-cores // 2)))
    assert given["iteration-001/training"] == list(range(-(-cores // 2), cores))
