"""The table of the benchmark of lags; the rest is a run's own stages."""

from typing import Any

import pytest

from benchmarks import lag


def curve(*golds: float) -> list[dict[str, Any]]:
    return [{"gold_reward_mean": gold, "kl": gold / 4} for gold in golds]


def test_the_last_policies_are_compared_seed_by_seed() -> None:
    found = {
        ("dpo", 0): [curve(0.5, 0.6, 0.8), curve(0.5, 0.62, 0.9)],
        ("dpo", 1): [curve(0.5, 0.6, 0.7), curve(0.5, 0.62, 0.8)],
    }
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in lag.table(found, 2).splitlines()]
    assert lines[0] == ["algorithm", "lag", "1", "2", "difference from lag 0", "KL"]
    # Both fell by 0.1: the seeds differ, and their differences do not.
    assert lines[2] == ["dpo", "0", "0.610", "0.850 ± 0.635", "", "0.21"]
    assert lines[3] == ["dpo", "1", "0.610", "0.750 ± 0.635", "-0.100 ± 0.000", "0.19"]


def test_an_interval_is_students() -> None:
    assert lag.with_interval([1.0, 2.0, 3.0, 4.0, 5.0], "{:.1f}") == "3.0 ± 1.963"
    assert lag.with_interval([1.0], "{:+.2f}") == "+1.00"


def test_the_runs_differ_in_nothing_but_what_is_compared(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graphs = [lag.graph_of(tmp_path, algorithm, 3, number, 2) for algorithm in lag.RECIPES for number in (0, 1)]
    policies = [graph.nodes["iteration-002/generation"].path("policy").parts[-2:] for graph in graphs]
    assert policies == [("iteration-001", "training"), ("setup", "sft")] * 2
    algorithms = [graph.nodes["iteration-001/training"].config.model_dump()["algorithm"] for graph in graphs]
    assert algorithms == ["dpo", "dpo", "decoupled_ppo", "decoupled_ppo"]
    assert (
        len(
            {
                repr(graph.nodes["setup/sft"].config.model_dump(exclude={"output", "model", "demonstrations"}))
                for graph in graphs
            }
        )
        == 1
    )
