"""Lag: which policy an iteration samples from, whom that makes wait, and what is refused."""

import graphlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pipelines_retention import Run, digests, small_stages

from contracts.config import Role, validate
from contracts.errors import UserError
from pipelines.config.changes import merge
from pipelines.config.load import load_run_config
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, name_of
from pipelines.hub.cards import _sampler
from pipelines.insight.metrics_collector import Collector
from pipelines.insight.report.data import RunReport
from pipelines.insight.report.statements import statements
from pipelines.insight.report.timing import time_facts
from pipelines.iteration import build_graph
from pipelines.main import main
from pipelines.planning.iterations import lag_beyond_run
from pipelines.run.directory import RunDirectory
from pipelines.run.fork import CONFIG, fork
from pipelines.run.retention import why_kept
from training.registry import describe

__all__ = ["small_stages"]
LAGS = st.integers(0, 4)
CORRECTED = {"level": "sequence", "treatment": "mask", "high": 3.0}
ALGORITHMS = ["dpo", "simpo", "decoupled_ppo", "ppo", "grpo", "rloo", "remax", "cispo"]
"""Of pairs and of samples, with a reference and without, with a critic and greedy answers; some need a correction."""


@st.composite
def trainings(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of an iteration that go with one another."""
    description = describe(draw(st.sampled_from(ALGORITHMS)))
    training: dict[str, Any] = {"algorithm": description.algorithm, "settings": {}, "correction": None}
    found: dict[str, Any] = {"training": training, "lag": draw(LAGS)}
    if description.corrections:
        training["correction"] = CORRECTED
    training["value_head"] = "values" in description.needs and draw(st.booleans())
    found["accumulate"] = description.reads == "pairs" and draw(st.booleans())
    found["reference"] = draw(st.sampled_from(["initial", "previous", "ema"]))
    adapts = description.reads == "samples" and description.penalises_divergence and "reference" in description.needs
    found["experience"] = {"kl_target": draw(st.sampled_from([None, 6.0])) if adapts else None}
    return found


RUNS = st.tuples(
    trainings(), st.dictionaries(st.integers(1, 6), trainings(), max_size=2), st.integers(0, 5), st.integers(0, 3)
)
"""What holds at first, changes by iteration, iterations, and how many are added."""


@pytest.fixture(scope="module")
def base(shared_smallest: Path) -> dict[str, Any]:
    return load_run_config(shared_smallest, ["generation.k=4"]).settings()


def config_of(base: dict[str, Any], first: dict[str, Any], changes: dict[int, dict[str, Any]]) -> RunConfig:
    return validate(RunConfig, {**merge(base, first), "changes": changes}, "generated")


def ancestors(graph: Graph, name: str) -> set[str]:
    found, todo = {name}, [name]
    while todo:
        for needed in graph.nodes[todo.pop()].needs:
            if needed not in found:
                found.add(needed)
                todo.append(needed)
    return found - {name}


def sampler_of(graph: Graph, name: str) -> int:
    """The iteration whose policy answers in a stage."""
    policy = graph.producer(graph.nodes[name].path("policy"))
    assert policy is not None
    assert policy.role == "training" or policy.name == "setup/sft"
    return policy.iteration or 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=RUNS)
def test_no_sample_is_older_than_the_bound(base: dict[str, Any], run: Any) -> None:
    first, changes, iterations, _ = run
    config = config_of(base, first, changes)
    graph = build_graph(config, iterations)
    graphlib.TopologicalSorter({name: node.needs for name, node in graph.nodes.items()}).prepare()
    for iteration in range(1, iterations + 1):
        lag = config.at(iteration).lag
        expected = max(0, iteration - 1 - lag)
        for role in ("generation", "greedy/generation"):
            if (name := name_of(iteration, role)) in graph.nodes:
                assert sampler_of(graph, name) == expected
        # It can be had before any policy that is newer.
        trained = {graph.nodes[name].iteration for name in ancestors(graph, name_of(iteration, "generation"))}
        assert max((number for number in trained if number is not None), default=0) == expected
        training = graph.nodes[name_of(iteration, "training")]
        start = graph.producer(training.path("model"))
        assert start is not None
        assert (start.iteration or 0) == iteration - 1, "the training itself starts at the last policy"
        data = [name for name in training.needs if graph.nodes[name].role in ("pairs", "experience")]
        used = {graph.nodes[name].iteration: graph.sampler(graph.nodes[name].path("rollouts")) for name in data}
        assert iteration in used
        if not config.at(iteration).accumulate:
            assert list(used) == [iteration]
        for number, sampling in used.items():
            assert sampling is not None
            assert sampling.name == name_of(number, "generation")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=RUNS)
def test_a_run_of_more_iterations_keeps_all_stages(base: dict[str, Any], run: Any) -> None:
    """Whoever starts the run again with more iterations makes none of them anew, and has kept what they read."""
    first, changes, iterations, more = run
    config = config_of(base, first, changes)
    short, long = build_graph(config, iterations), build_graph(config, iterations + more)
    assert list(long.nodes)[: len(short.nodes)] == list(short.nodes)
    for name, node in short.nodes.items():
        assert (node.config, node.needs) == (long.nodes[name].config, long.nodes[name].needs)
    further = [node for node in long.nodes.values() if (node.iteration or 0) > iterations]
    wanted = {needed for node in further for needed in node.needs if long.nodes[needed].role == "training"}
    policies = [node.name for node in short.nodes.values() if node.role == "training"]
    assert wanted & short.nodes.keys() <= set(policies[-1 - short.lag :])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=trainings(), start=st.sampled_from(["previous", "initial"]), iterations=st.integers(0, 4))
def test_without_a_lag_keys_are_as_they_were(
    base: dict[str, Any], first: dict[str, Any], start: str, iterations: int
) -> None:
    first["training"].pop("correction")
    value_head = first["training"]["value_head"]
    first["start"] = "previous" if value_head else start
    without = build_graph(config_of(base, {key: value for key, value in first.items() if key != "lag"}, {}), iterations)
    zero = build_graph(config_of(base, first | {"lag": 0}, {}), iterations)
    assert list(without.nodes) == list(zero.nodes)
    for name, node in zero.nodes.items():
        for role in (Role.IDENTITY, Role.INPUT):
            assert node.config.select(role) == without.nodes[name].config.select(role)
            assert "correction" not in node.config.select(role)


def graph_of(config: Path, iterations: int, *overrides: str) -> Graph:
    return build_graph(load_run_config(config, list(overrides)), iterations)


def test_what_reads_the_last_policy_and_what_the_one_that_samples(smallest: Path) -> None:
    """At lag 1 generation waits for no training of the iteration before; its reference, `previous`, does."""
    ppo = ["lag=1", "training.algorithm=decoupled_ppo", "training.settings={}", "reference=previous"]
    graph = graph_of(smallest, 3, *ppo)
    needs = {role: set(graph.nodes[f"iteration-003/{role}"].needs) for role in ("generation", "reference", "values")}
    assert needs["generation"] == {"iteration-001/training", "prompts/train"}
    assert needs["reference"] == {"iteration-003/generation", "iteration-002/training"}
    assert needs["values"] == {"iteration-003/generation", "iteration-002/critic"}
    assert "iteration-002/training" in graph.nodes["iteration-003/training"].needs
    assert "iteration-003/training" in graph.nodes["iteration-003/heldout/generation"].needs
    own = graph_of(smallest, 3, *ppo, "training.value_head=true").nodes["iteration-003/values"]
    assert set(own.needs) == {"iteration-003/generation", "iteration-002/training"}
    order = [node.name for node in graph.by_urgency()]
    assert order.index("iteration-002/generation") < order.index("iteration-001/heldout/generation")


def test_the_lag_can_change_within_a_run_and_in_a_fork(smallest: Path) -> None:
    graph = graph_of(smallest, 5, "lag=2", "changes={4: {lag: 0}}")
    assert [sampler_of(graph, f"iteration-00{number}/generation") for number in range(1, 6)] == [0, 0, 0, 3, 4]
    assert graph_of(smallest, 3, "changes={5: {lag: 2}}").lag == 2, "as iteration 5 samples from policy 2"
    run = Run(smallest)
    run.drive(3)
    target, _ = fork(RunDirectory.existing(run.path), 3, ["lag=1"], None)
    started = Run(target / CONFIG).drive(3)
    assert "iteration-003/generation" in started
    assert not any(name.startswith(("setup", "iteration-001", "iteration-002")) for name in started)


def test_weights_stay_while_further_iterations_sample_from_them(smallest: Path) -> None:
    whole = Run(smallest, f"directory={smallest.parent / 'whole'}", "lag=2")
    whole.drive(5)
    run = Run(smallest, "lag=2", "retention.keep=last 1")
    run.drive(3)
    reasons = why_kept(run.path, run.graph, set(run.graph.nodes), "last 1")
    assert reasons == {
        "iteration-001/training": "more iterations sample from it, at lag=2",
        "iteration-002/training": "more iterations sample from it, at lag=2",
        "iteration-003/training": "the last policy, from which more iterations start",
    }
    started = run.drive(5)
    assert not any(name < "iteration-004" for name in started), "nothing was made again for its weights"
    assert "iteration-001/training" in run.released()
    assert run.digests() == digests(whole.path)


def test_a_point_counts_the_steps_of_the_policy_that_answered(smallest: Path) -> None:
    """Whatever else has been trained when it is written: what is told of a run depends on no chance."""
    config = load_run_config(smallest, ["lag=1"])
    graph = build_graph(config, 4)
    newest = Collector(RunDirectory(config.run_directory), graph)._newest
    found = {role: newest[f"iteration-004/{role}"] for role in ("generation", "pairs", "training", "heldout/reward")}
    assert found == {"generation": 2, "pairs": 2, "training": 3, "heldout/reward": 4}


def test_a_card_names_the_policy_that_gave_the_answers() -> None:
    assert _sampler(3, 0) == "the policy before"
    assert [_sampler(number, 1) for number in (1, 2, 3, 4)] == [
        "the initial policy", "the initial policy", "`iteration-1`", "`iteration-2`"
    ]  # fmt: skip


def test_a_report_says_it(tmp_path: Path) -> None:
    report = RunReport(name="r", path=str(tmp_path), made=0.0, state="finished", iterations=2, time=time_facts([], []))
    report.evaluations = [{"iteration": number, "reward_mean": float(number)} for number in (0, 1)]
    report.config_of = {"lag": 2}
    (learning,) = [found for found in statements(report) if found.topic == "learning"]
    older = "on answers of a policy that is 2 iterations older than the one that is trained"
    assert learning.details[-1] == f"It was trained with lag=2: {older}."
    report.config_of = {"lag": 0}
    assert not any("lag" in line for found in statements(report) for line in found.details)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lag=-1"], "'lag' is -1"),
        (["lag=0.5"], "'lag' is 0.5"),
        (["lag=1", "start=initial"], "lag=1 with start=initial: .* Set start=previous, or lag=0"),
        (
            ["lag=1", "training.algorithm=grpo"],
            r"lag=1, but training.algorithm=grpo expects samples .* set lag=0, or choose .*\(decoupled_ppo, or one "
            r"on pairs\), or correct for it, .*training.correction=\{level: token",
        ),
        (["lag=1", "training.algorithm=rloo"], r"training.correction=\{level: sequence"),
        (["lag=2", "training.algorithm=raft"], "an algorithm that takes older answers .* or one on pairs"),
        (["lag=1", "training.correction={}"], "correction is not for algorithm=dpo: it learns from answers of older"),
        (
            ["lag=1", "training.algorithm=rloo", "training.correction={}"],
            "correction.level is token, but algorithm=rlo",
        ),
        (["changes={2: {training: {algorithm: grpo}}}", "lag=1"], "changes.2.*: lag=1, but training.algorithm=grpo"),
    ],
)
def test_what_cannot_be(smallest: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["training.settings={}", *overrides]
    with pytest.raises(UserError, match=message):
        load_run_config(smallest, overrides)
    assert main(["run", str(smallest), *overrides]) == 2
    assert "lag" in capsys.readouterr().err or "correction" in message
    assert not (smallest.parent / "runs").exists()


def test_a_correction_allows_a_lag(smallest: Path) -> None:
    grpo = ["lag=1", "training.algorithm=grpo", "training.settings={}", "training.correction.level=geometric"]
    config = graph_of(smallest, 2, *grpo).nodes["iteration-002/training"].config.model_dump()
    assert config["correction"] == {"level": "geometric", "treatment": "truncate", "high": 2.0, "low": 0.0}


def test_a_lag_beyond_the_run_is_told(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lag_beyond_run(graph_of(smallest, 3, "lag=1")) is None
    assert lag_beyond_run(graph_of(smallest, 1, "lag=3")) is None, "as a run that has only begun"
    assert lag_beyond_run(graph_of(smallest, 3)) is None
    assert main(["run", str(smallest), "--iters", "3", "--dry-run", "lag=2"]) == 0
    told = capsys.readouterr()
    assert "warning: lag=2 with 3 iterations: all of them sample from the initial policy" in told.out + told.err
