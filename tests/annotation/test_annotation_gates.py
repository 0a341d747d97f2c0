"""Gates: what is decided of given metrics, and that the stage publishes it."""

import json
import math

import msgspec
import pytest
from annotation_world import publish
from hypothesis import given
from hypothesis import strategies as st

from annotation.gating.config import GateConfig, GateSettings
from annotation.gating.decision import GateDecision, Measured, decide
from annotation.stages.gate import DECIDE
from contracts.records import CHECKPOINT_EVALUATION, EVALUATION
from contracts.stage import run_stage


def config(iteration=1, **gates):
    return GateConfig(output="o", evaluation="e", initial="i", iteration=iteration, conditions=gates)


def measured(iteration, gates, **metrics):
    return Measured.of({"iteration": iteration, "reward_mean": 0.0, **metrics}, gates)


def after(gates, rows):
    """The decisions after each of some iterations, of which the first is the initial policy."""
    decision, found = None, []
    initial = measured(0, config(**gates), **rows[0])
    for iteration, row in enumerate(rows[1:], 1):
        now = config(iteration, **gates)
        decision = decide(now, initial, measured(iteration, now, **row), decision)
        found.append(decision)
    return found


def gate(metric, do, **keys):
    return GateSettings(metric=metric, do=do, **keys)


def test_a_condition_holds_where_the_whole_interval_is_beyond_the_bound():
    drift = gate("kl", "warn", above=20)
    for value, half, holds in ((21, 0.5, True), (21, 1.5, False), (19, 5, False), (21, None, True)):
        (decision,) = after({"drift": drift}, [{"kl": 0.0}, {"kl": value, "kl_ci95": half}])
        assert decision.holds == {"drift": holds}
        assert decision.action == "go on"
        assert ("drift" in decision.warnings) is holds
    (decision,) = after({"drift": gate("kl", "warn", above=20, interval=False)}, [{}, {"kl": 21, "kl_ci95": 9}])
    assert decision.text == "the gate drift warns of iteration 1: kl is 21, above 20."


@given(*(st.floats(0.1, 100) for _ in range(2)), *(st.floats(0, 10) for _ in range(2)), st.floats(0.1, 3))
def test_against_another_policy_both_intervals_count(value, other, half, its, factor):
    rows = [
        {"response_length": other, "response_length_ci95": its},
        {"response_length": value, "response_length_ci95": half},
    ]
    relative = gate("response_length", "stop", above=factor, relative_to="initial")
    difference = gate("response_length", "stop", below=-factor, difference_to="previous")
    (decision,) = after({"long": relative, "short": difference}, rows)
    assert decision.holds["long"] == (value - factor * other - math.hypot(half, factor * its) > 0)
    assert decision.holds["short"] == (value - other + factor + math.hypot(half, its) < 0)


def test_what_is_not_known_decides_nothing_and_is_told():
    (decision,) = after({"drift": gate("kl", "stop", above=20)}, [{}, {"kl": None}])
    assert (decision.action, decision.holds) == ("go on", {"drift": None})
    assert "kl of iteration 1 is not known" in decision.warnings["drift"]


def test_patience_asks_for_iterations_in_a_row_and_first_leaves_out_the_early_ones():
    rows = [{"kl": kl} for kl in (0, 30, 30, 1, 30, 30)]
    drift = {"metric": "kl", "do": "stop", "above": 20}
    assert [d.action for d in after({"d": GateSettings(**drift, patience=2)}, rows)].index("stop") == 1
    assert [d.action for d in after({"d": GateSettings(**drift, patience=2, first=2)}, rows)].index("stop") == 4


def test_the_gravest_decides_and_the_others_are_told():
    gates = {
        "a": gate("kl", "warn", above=1),
        "b": gate("kl", "rollback", above=2),
        "c": gate("kl", "stop", above=3),
        "d": gate("kl", "stop", above=4),
    }
    (decision,) = after(gates, [{"kl": 0.0}, {"kl": 5.0}])
    assert (decision.action, decision.gate) == ("stop", "c")
    assert set(decision.warnings) == {"a", "b", "d"}


def test_a_policy_for_which_a_gate_holds_is_never_the_best_though_its_reward_is():
    gates = {"long": gate("response_length", "rollback", above=1.5, relative_to="initial", at_most=9)}
    lengths = [10.0, 11.0, 40.0, 12.0, 50.0]
    found = after(gates, [{"response_length": length, "reward_mean": length} for length in lengths])
    assert [d.best.iteration for d in found] == [1, 1, 3, 3]
    assert [d.start for d in found] == [1, 1, 3, 3]
    assert [d.last.iteration for d in found] == [1, 1, 3, 3]
    assert found[-1].rollbacks == {"long": 2}


def test_the_best_is_that_by_gold_where_there_is_gold():
    gates = {"long": gate("response_length", "warn", above=99)}
    rows = [{"gold_reward_mean": gold, "reward_mean": reward} for gold, reward in ((1, 1), (3, 2), (2, 3))]
    assert after(gates, rows)[-1].best.iteration == 1


def test_the_stage_publishes_the_decision_and_the_next_one_reads_it(tmp_path):
    rows = [{"iteration": i, "reward_mean": 0.0, "kl": 8.0 * i, "kl_ci95": 0.5} for i in range(3)]
    paths = [publish(tmp_path / f"e{i}", EVALUATION, [], facts={"metrics": row}).path for i, row in enumerate(rows)]
    drift = gate("kl", "stop", above=1, patience=2)
    conditions = {"drift": drift.model_dump(mode="json")}  # as a driver hands it over, with every key
    earlier, found = None, []
    for iteration in (1, 2):
        given = {"evaluation": paths[iteration], "initial": paths[0], "iteration": iteration, "earlier": earlier}
        output = tmp_path / f"gate{iteration}"
        artifact = run_stage(DECIDE, GateConfig(output=output, conditions=conditions, **given))
        decision = msgspec.json.decode((output / "gate.json").read_bytes(), type=GateDecision)
        assert json.loads((output / "gate.json").read_text()) == artifact.manifest.facts["gate"]
        assert str(artifact.manifest.ledger) == "1 gates in = 1 kept"
        earlier = output
        found.append(decision)
    assert [decision.action for decision in found] == ["go on", "stop"]
    assert found[1].reason == (
        "the gate drift stops the run after iteration 2: kl is 16 ± 0.5, above 1 for 2 iterations in a row."
    )


@pytest.mark.parametrize("metric", ["win_rate", "kl", "response_length", "kendall_gold", "some_mean"])
def test_settings_say_one_thing(metric):
    with pytest.raises(ValueError, match="either above or below"):
        gate(metric, "warn", above=0.5, below=0.2)
    with pytest.raises(ValueError, match="give one of the two"):
        gate("stop_rate", "warn", above=0.5, relative_to="initial", difference_to="initial")


def test_metrics_of_the_users_own_evaluations_decide_in_the_iterations_that_have_them(tmp_path):
    rows = [{"iteration": i, "reward_mean": 0.0} for i in range(6)]
    paths = [publish(tmp_path / f"e{i}", EVALUATION, [], facts={"metrics": row}).path for i, row in enumerate(rows)]
    accuracies = {0: 0.5, 2: 0.3, 4: 0.2}
    own = {
        i: publish(
            tmp_path / f"o{i}", CHECKPOINT_EVALUATION, [], facts={"metrics": {"arc/acc": acc, "arc/acc_ci95": 0.05}}
        ).path
        for i, acc in accuracies.items()
    }
    worse = gate("lm/arc/acc", "stop", below=-0.1, difference_to="initial", patience=2)
    earlier, found = None, []
    for iteration in range(1, 6):
        given = {"evaluation": paths[iteration], "initial": paths[0], "iteration": iteration, "earlier": earlier}
        given["initial_evaluations"] = {"lm": own[0]}
        given["evaluations"] = {"lm": own[iteration]} if iteration in own else {}
        earlier = tmp_path / f"gate{iteration}"
        artifact = run_stage(DECIDE, GateConfig(output=earlier, conditions={"worse": worse}, **given))
        found.append(msgspec.convert(artifact.manifest.facts["gate"], GateDecision))
        assert artifact.manifest.ledger.dropped == ({} if iteration in own else {"not evaluated": 1})
    assert [decision.action for decision in found] == ["go on", "go on", "go on", "stop", "go on"]
    assert [decision.holds["worse"] for decision in found] == [None, True, None, True, None]
    assert not any(decision.warnings for decision in found)
    assert found[3].reason == (
        "the gate worse stops the run after iteration 4: lm/arc/acc is 0.2 ± 0.05, below the 0.5 ± 0.05 of the initial "
        "policy by more than 0.1 for 2 iterations in a row."
    )
