"""Gates: what they decide, that a stopped run stays stopped, and where a run goes on that was taken back."""

import contextlib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from small_stages import make
from test_pipelines_retention import Run, Stages, digests, small_stages

from contracts.errors import RunStoppedError, UserError
from pipelines.config.load import load_run_config
from pipelines.config.sections import HubSection
from pipelines.execution.supervisor import REQUEST, AttemptRequest
from pipelines.graph import Graph, Node, name_of
from pipelines.hub.cards import _parents
from pipelines.hub.published_run import PublishedRun
from pipelines.iteration import build_graph
from pipelines.run.directory import RunDirectory
from pipelines.run.events import GateDecided, RunEnded
from pipelines.run.fork import CONFIG, fork
from pipelines.run.gates import refused, stop_decision
from pipelines.run.gc import up_to_date
from pipelines.run.metrics import best_of, evaluations

__all__ = ["small_stages"]
WORSE = {"metric": "reward_mean", "below": -0.3, "difference_to": "best", "interval": False}
"""Holds first in iteration 3, whose reward is 0.3 after 0.9 in iteration 2."""


def gates(**named: dict[str, Any]) -> str:
    return f"gates={yaml.safe_dump(named, default_flow_style=True, width=10**6).strip()}"


def graph_of(run: Run, iterations: int, *overrides: str) -> Graph:
    return build_graph(load_run_config(run.config, [*run.overrides, *overrides]), iterations)


@pytest.fixture
def run(smallest: Path) -> Run:
    return Run(smallest)


def test_without_gates_nothing_is_different_and_with_them_what_they_let_pass_is_the_same(run, smallest):
    plain, gated = graph_of(run, 3), graph_of(run, 3, gates(low={"metric": "reward_mean", "below": -9, "do": "stop"}))
    assert "gate" not in {node.role for node in plain.nodes.values()}
    for name, node in plain.nodes.items():
        if node.role != "evaluation":
            assert gated.nodes[name].config == node.config
    assert {node.name for node in gated.nodes.values()} - set(plain.nodes) == {name_of(i, "gate") for i in (1, 2, 3)}


def test_a_stop_ends_the_run_and_the_same_command_says_the_same(run):
    stop = gates(worse={**WORSE, "do": "stop"})
    with pytest.raises(
        RunStoppedError, match=r"gate worse stops the run after iteration 3: reward_mean is 0\.3, "
    ) as first:
        run.drive(5, stop)
    assert not list((run.path / "iteration-004").glob("*"))
    directory = RunDirectory(run.path)
    assert [e.outcome for e in directory.events() if isinstance(e, RunEnded)] == ["stopped"]
    with pytest.raises(RunStoppedError) as second:
        run.drive(5, stop)
    assert str(first.value) == str(second.value)
    assert "run " not in run.lines
    assert stop_decision(graph_of(run, 5, stop)).iteration == 3


def test_a_stopped_run_goes_on_when_the_gate_is_told_to_look_later(run):
    with pytest.raises(RunStoppedError):
        run.drive(4, gates(worse={**WORSE, "do": "stop"}))
    again = run.drive(4, gates(worse={**WORSE, "do": "stop", "first": 5}))
    assert {name.partition("/")[0] for name in again if not name.endswith("gate")} == {"iteration-004"}
    plain = Run(run.config, f"directory={run.path.parent / 'plain'}")
    plain.drive(4)
    ours, theirs = digests(run.path), digests(plain.path)
    assert {name for name in theirs if ours.get(name) != theirs[name]} == {name_of(i, "evaluation") for i in range(5)}


BACK = {**WORSE, "do": "rollback", "at_most": 3, "changes": {"training": {"settings": {"beta": 0.3}}}}


def test_a_rollback_goes_on_from_the_best_with_changed_values(run):
    run.drive(5, gates(worse=BACK), "retention.keep=best")
    graph = graph_of(run, 5, gates(worse=BACK))
    trained = {node.iteration: node for node in graph.nodes.values() if node.role == "training"}
    models = {iteration: graph.producer_name(node.path("model")) for iteration, node in trained.items()}
    assert [models[i] for i in (1, 2, 3)] == ["setup/sft", name_of(1, "training"), name_of(2, "training")]
    assert [models[i] for i in (4, 5)] == [name_of(2, "training")] * 2
    betas = {iteration: node.config.settings.get("beta", 0.1) for iteration, node in trained.items()}
    assert betas == {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.3, 5: 0.3}
    assert graph.nodes[name_of(4, "evaluation")].path("previous") == run.path / name_of(2, "heldout/reward")
    assert refused(graph) == {3, 4, 5}
    assert best_of(evaluations(graph), refused(graph))[1]["iteration"] == 2
    texts = [event.text for event in RunDirectory(run.path).events() if isinstance(event, GateDecided)]
    assert texts[0] == (
        "the gate worse rolls back after iteration 3: reward_mean is 0.3, below the 0.9 of iteration 2 by more than "
        "0.3; iteration 4 starts from iteration 2, the best by reward_mean."
    )
    assert len(texts) == 3
    published = PublishedRun(RunDirectory.existing(run.path), HubSection(model="a/b"))
    assert published.best(5) == 2
    assert next(_parents(published, 4, "base", {})).startswith("trained from `iteration-2`, ")
    assert name_of(2, "training") not in run.released()
    assert run.drive(5, gates(worse=BACK)) == []


LATER = gates(worse={**BACK, "below": -0.1, "patience": 2})
"""Rolls back after iteration 4, and after iteration 6, to iteration 2."""


def test_with_a_lag_what_was_sampled_from_a_policy_that_is_left_behind_is_made_anew(run):
    started = run.drive(6, LATER, "lag=1")
    graph = graph_of(run, 6, LATER, "lag=1")
    assert graph.rollbacks == {name_of(4, "gate"): 2, name_of(6, "gate"): 2}
    sampled = [graph.producer_name(graph.nodes[name_of(i, "generation")].path("policy")) for i in (3, 4, 5, 6)]
    assert sampled == [name_of(i, "training") for i in (1, 2, 2, 2)]
    assert graph.producer_name(graph.nodes[name_of(5, "training")].path("model")) == name_of(2, "training")
    assert started.count(name_of(5, "generation")) == 2, "before the decision, and after it"
    assert started.count(name_of(4, "generation")) == started.count(name_of(5, "training")) == 1
    assert started.index(name_of(5, "training")) > started.index(name_of(4, "gate"))
    assert up_to_date(graph) == set(graph.nodes)
    assert run.drive(6, LATER, "lag=1") == []


class AtWork:
    """A stage that publishes only when a gate has decided meanwhile."""

    pid: int | None = None

    def __init__(self, node: Node, gate: Path) -> None:
        self.node, self.gate, self.looks, self.made = node, gate, 0, False
        self.beside = 0

    def ended(self) -> bool:
        self.looks += 1
        self.beside += self.gate.is_dir()
        if not self.made and (self.beside > 3 or self.looks > 500):
            make(self.node, "")
            self.made = True
        return self.made

    def news(self) -> None:
        pass

    def clear(self) -> list[Any]:
        return []


def test_what_is_at_work_when_the_run_is_taken_back_ends_and_is_made_anew(run):
    slow: list[AtWork] = []
    names: list[str] = []

    def prepare(stages: Stages) -> None:
        plain = stages.submit

        def submit(node: Node, attempt: Path) -> Any:
            assert not slow or slow[0].made or not slow[0].gate.is_dir(), "nothing begins meanwhile"
            if node.name != name_of(5, "generation") or slow:
                return plain(node, attempt)
            (attempt / REQUEST).write_bytes(msgspec.json.encode(AttemptRequest([], {}, [], "", "", None)))
            names.append(node.name)
            slow.append(AtWork(node, run.path / name_of(4, "gate")))
            return slow[0]

        stages.submit = submit  # type: ignore[method-assign,assignment]

    options = (LATER, "lag=1", "executor.parallel=4")
    started = run.drive(6, *options, prepare=prepare)
    assert slow[0].beside > 3, "it was at work when the gate decided"
    assert started.count(name_of(5, "generation")) == 1, "made anew"
    whole = Run(run.config, f"directory={run.path.parent / 'whole'}")
    whole.drive(6, LATER, "lag=1")
    ours, theirs = digests(run.path), digests(whole.path)
    assert all(ours[name] == digest for name, digest in theirs.items() if "superseded" not in name)
    assert run.drive(6, *options) == []


def test_a_rollback_with_a_lag_is_the_same_in_a_run_that_was_interrupted(run):
    count = 0

    def interrupted(stages: Stages) -> None:
        def after() -> None:
            if len(stages.started) > 5:
                raise KeyboardInterrupt

        stages.after = after

    while not (run.path / name_of(6, "gate")).is_dir():
        count += 1
        with contextlib.suppress(KeyboardInterrupt):
            run.drive(6, LATER, "lag=1", prepare=interrupted)
    run.drive(6, LATER, "lag=1")
    assert count > 5
    whole = Run(run.config, f"directory={run.path.parent / 'whole'}")
    whole.drive(6, LATER, "lag=1")
    ours, theirs = digests(run.path), digests(whole.path)
    assert {name: ours[name] for name in theirs if "superseded" not in name} == {
        name: digest for name, digest in theirs.items() if "superseded" not in name
    }


def test_a_run_that_was_interrupted_again_and_again_is_taken_back_to_the_same(run):
    def interrupted(stages: Stages) -> None:
        def after() -> None:
            if len(stages.started) > 16:
                raise KeyboardInterrupt

        stages.after = after

    while not (run.path / name_of(4, "gate")).is_dir():
        with contextlib.suppress(KeyboardInterrupt):
            run.drive(4, gates(worse=BACK), prepare=interrupted)
    whole = Run(run.config, f"directory={run.path.parent / 'whole'}")
    whole.drive(4, gates(worse=BACK))
    assert digests(run.path) == digests(whole.path)


def test_a_rollback_more_than_allowed_is_a_stop(run):
    with pytest.raises(RunStoppedError, match=r"after iteration 4: .* rolled back once already"):
        run.drive(5, gates(worse={**BACK, "at_most": 1}))


def test_a_fork_knows_what_the_gates_of_its_past_have_decided(run):
    run.drive(4, gates(worse=BACK))
    target, _ = fork(RunDirectory.existing(run.path), 4, ["training.learning_rate=0.5"], None)
    forked = build_graph(load_run_config(target / CONFIG, []), 4)
    trained = forked.nodes[name_of(4, "training")]
    assert forked.producer_name(trained.path("model")) == name_of(2, "training")
    assert (trained.config.learning_rate, trained.config.settings["beta"]) == (0.5, 0.3)


def test_the_best_by_the_gates_keeps_its_weights(run):
    """Iteration 2 is refused: its reward is best, and is no merit."""
    bar = gates(high={"metric": "reward_mean", "above": 0.8, "do": "stop", "patience": 2, "interval": False})
    run.drive(6, bar, "retention.keep=best")
    assert name_of(2, "training") in run.released()
    assert name_of(6, "training") not in run.released()
    assert "iteration 6" in run.lines or best_of(evaluations(graph_of(run, 6, bar)), {2})[1]["iteration"] == 6


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"metric": "eval/kl", "above": 1, "do": "warn"}, "Did you mean 'kl'?"),
        (
            {"metric": "respons_length", "above": 2, "relative_to": "initial", "do": "warn"},
            "'respons_length', which evaluations do not have. Did you mean 'response_length'?",
        ),
        ({"metric": "gold_reward", "above": 1, "do": "warn"}, "Did you mean 'gold_reward_mean'?"),
        ({"metric": "kl", "do": "warn"}, "give either above or below"),
        ({"metric": "win_rate", "above": 1, "do": "warn"}, "above=1 can never hold: win_rate is at most 1"),
        ({"metric": "stop_rate", "below": 0, "do": "warn"}, "below=0 can never hold: stop_rate is at least 0"),
        ({"metric": "spearman_gold", "below": -2, "do": "warn"}, "is at least -1"),
        ({"metric": "stop_rate", "above": 2, "difference_to": "best", "do": "warn"}, "is at most 1"),
        ({"metric": "kl", "above": 2, "relative_to": "initial", "do": "warn"}, "kl can be negative"),
        ({"metric": "kl", "above": 2, "do": "warn", "at_most": 2}, "at_most is for do=rollback"),
        ({"metric": "kl", "above": 2, "do": "warn", "changes": {"seed": 1}}, "changes are made by do=rollback"),
        ({"metric": "response_length", "above": 12, "do": "warn"}, "at most evaluation.max_new_tokens=12 tokens"),
        ({"metric": "win_rate_previous", "below": 0.1, "relative_to": "initial", "do": "stop"}, "can never hold"),
        ({"metric": "kl", "above": 2, "do": "rollback", "changes": {"policy": "x"}}, "gates.g.changes: policy cannot"),
        ({"metric": "kl", "above": 2, "do": "rollback", "changes": {"training": {"beta": 1}}}, "training.beta"),
    ],
)
def test_a_gate_that_could_never_hold_is_refused(smallest, gate, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_run_config(smallest, [gates(g=gate)])


def test_what_the_rest_of_the_run_makes_impossible_is_refused(smallest):
    drift = gates(drift={"metric": "kl", "above": 2, "do": "warn"})
    with pytest.raises(UserError, match=r"gates\.drift can never hold: kl is estimated from answers at temperature 1"):
        load_run_config(smallest, [drift, "evaluation.temperatures=[0.7]"])
    same = gates(same={"metric": "self_similarity", "above": 0.9, "do": "warn"})
    with pytest.raises(UserError, match=r"evaluation\.k=1 samples one"):
        load_run_config(smallest, [same, "evaluation.k=1"])


def test_with_a_lag_the_training_waits_for_the_last_decision_and_the_sampling_for_an_earlier_one(run):
    graph = graph_of(run, 4, gates(drift={"metric": "kl", "above": 2, "do": "stop"}), "lag=1")
    assert name_of(3, "gate") in graph.nodes[name_of(4, "training")].needs
    assert name_of(3, "gate") not in graph.nodes[name_of(4, "generation")].needs
    assert name_of(2, "gate") in graph.nodes[name_of(4, "generation")].needs


OWN = "evaluations={lm: {function: 'evals.py:run', every: 2}}"


def own_gate(metric="lm/arc/acc", basis="initial", **keys):
    return gates(own={"metric": metric, "below": -0.1, "difference_to": basis, "do": "stop", **keys})


def test_gates_read_the_users_own_evaluations(smallest):
    graph = build_graph(load_run_config(smallest, [OWN, own_gate()]), 2)
    first, second = (graph.nodes[name_of(i, "gate")].config for i in (1, 2))
    own = {i: graph.directory / name_of(i, "evaluations/lm") for i in (0, 2)}
    assert (first.evaluations, first.initial_evaluations) == ({}, {"lm": own[0]})
    assert (second.evaluations, second.initial_evaluations) == ({"lm": own[2]}, {"lm": own[0]})
    assert name_of(2, "evaluations/lm") in graph.nodes[name_of(2, "gate")].needs
    assert graph.nodes[name_of(2, "evaluations/lm")].config.needed == ["arc/acc"]
    others = gates(low={"metric": "kl", "above": 9, "do": "stop"})
    unasked = build_graph(load_run_config(smallest, [OWN, others]), 2)
    assert unasked.nodes[name_of(2, "gate")].config.evaluations == {}


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (own_gate(metric="eval/lm/acc"), "Did you mean 'lm/acc'?"),
        (own_gate(metric="ml/acc"), "They have: reward_mean, "),
        (own_gate(basis="previous"), "by evaluations.lm.every=2 that is never evaluated"),
        (own_gate(difference_to=None, relative_to="initial", below=0.9), "lm/arc/acc can be negative"),
    ],
)
def test_bad_gates_on_the_users_own_evaluations(smallest, gate, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_run_config(smallest, [OWN, gate])
