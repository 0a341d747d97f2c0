"""Placement: where a stage runs and over how many devices, which changes nothing of what it computes."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contracts.config import Role
from contracts.errors import UserError
from contracts.stage import key_parts, stage_key
from pipelines.config.load import load_run_config
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Placement
from pipelines.iteration import build_graph
from pipelines.planning.cluster import Cluster, cluster_of
from pipelines.planning.placement import place
from pipelines.planning.scheduling import Admission

LIMITS = st.none() | st.integers(1, 4)
SETTINGS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["local", "inline", "slurm"]), "parallel": LIMITS},
    optional={
        "resources": st.fixed_dictionaries({"gpus": st.integers(1, 8)}, optional={"nodes": st.integers(1, 4)}),
        "stages": st.fixed_dictionaries({}, optional={"light": st.just("local"), "training": st.just("slurm")}),
    },
)
"""What a user may say of where stages run."""


@pytest.fixture(scope="module")
def config(shared_smallest: Path) -> RunConfig:
    return load_run_config(shared_smallest, ["training.algorithm=ppo", "training.settings={}", "generation.k=4"])


@pytest.fixture(scope="module")
def logical(config: RunConfig) -> Graph:
    return build_graph(config, 2)


def cluster(config: RunConfig, executor: dict[str, Any], gpus: int) -> Cluster:
    section = type(config.executor).model_validate(executor)
    return cluster_of(config.model_copy(update={"executor": section}), gpus)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(executor=SETTINGS, gpus=st.integers(0, 16))
def test_a_stage_has_the_same_key_wherever_it_runs(
    config: RunConfig, logical: Graph, executor: dict[str, Any], gpus: int
) -> None:
    placed = place(logical, cluster(config, executor, gpus))
    assert placed.nodes.keys() == logical.nodes.keys()
    here = Path(__file__)
    for name, node in placed.nodes.items():
        before = logical.nodes[name]
        assert node.placement is not None
        assert (node.needs, node.inputs, node.iteration, node.role) == (
            before.needs, before.inputs, before.iteration, before.role
        )  # fmt: skip
        for role in (Role.IDENTITY, Role.INPUT):
            assert node.config.select(role) == before.config.select(role), name
        keys = [stage_key(key_parts(one.config, {"torch": "2"}, where=lambda path: here)) for one in (node, before)]
        assert keys[0] == keys[1]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(executor=SETTINGS, gpus=st.integers(0, 8), order=st.randoms(use_true_random=False))
def test_stages_of_an_executor_run_at_once_up_to_its_limit(
    config: RunConfig, logical: Graph, executor: dict[str, Any], gpus: int, order: Any
) -> None:
    given = cluster(config, executor, gpus)
    placements = [node.placement for node in place(logical, given).nodes.values() if node.placement is not None]
    order.shuffle(placements)
    turn = Admission(given, [])
    taken: list[Placement] = []
    for placement in placements:
        beside = sum(other.executor == placement.executor for other in taken)
        limit = executor["parallel"] or (None if placement.executor == "slurm" else given.parallel)
        admitted = turn.admits(placement)
        assert admitted == (limit is None or beside < limit)
        if admitted:
            taken.append(placement)


def test_stages_with_devices_of_their_own_run_side_by_side(config: RunConfig) -> None:
    here = cluster(config, {"parallel": 1}, 4)
    left, right = Placement("local", (0, 1)), Placement("local", (2, 3))
    assert Admission(here, [left]).admits(right)
    assert not Admission(here, [left]).admits(Placement("local", (1, 2)))
    assert not Admission(here, [left, right]).admits(left)


def test_devices_that_an_urgent_stage_waits_for_are_given_to_no_later_one(config: RunConfig) -> None:
    turn = Admission(cluster(config, {"parallel": 1}, 4), [Placement("local", (0,))])
    assert not turn.admits(Placement("local", (0, 1)))
    assert not turn.admits(Placement("local", (1,))), "it would keep the first one out"
    assert turn.admits(Placement("local", (2, 3)))
    turn.release(Placement("local", (2, 3)))
    assert turn.admits(Placement("local", (3,)))


def test_by_default_a_stage_has_all_devices(config: RunConfig, logical: Graph) -> None:
    placed = place(logical, cluster(config, {}, 4)).nodes
    assert {node.placement for node in placed.values()} == {Placement("local", (0, 1, 2, 3))}
    training, generation = placed["iteration-001/training"].config, placed["iteration-001/generation"].config
    assert training.parallel.dp == generation.replicas == 4  # type: ignore[attr-defined]
    assert placed["iteration-001/reward"].config.replicas == 4  # type: ignore[attr-defined]
    assert placed["prompts/train"].config == logical.nodes["prompts/train"].config


def test_the_graph_that_is_placed_stays_as_it_was(config: RunConfig, logical: Graph) -> None:
    before = dict(logical.nodes)
    place(logical, cluster(config, {}, 8))
    assert logical.nodes == before
    assert all(node.placement is None for node in logical.nodes.values())


def test_what_the_user_has_set_stays(config: RunConfig, shared_smallest: Path) -> None:
    overrides = ["training.parallel.dp=2", "generation.replicas=3"]
    graph = build_graph(load_run_config(shared_smallest, overrides), 1)
    placed = place(graph, cluster(config, {}, 8)).nodes
    assert placed["iteration-001/training"].config.parallel.dp == 2  # type: ignore[attr-defined]
    assert placed["iteration-001/generation"].config.replicas == 3  # type: ignore[attr-defined]


def test_several_machines_need_a_scheduler(shared_smallest: Path) -> None:
    config = load_run_config(shared_smallest, ["training.parallel={dp: 2, nodes: 2}"])
    with pytest.raises(UserError, match=r"parallel\.nodes is 2, but it runs on this machine alone"):
        place(build_graph(config, 1), cluster_of(config))
