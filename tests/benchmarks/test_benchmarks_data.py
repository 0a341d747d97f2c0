"""The runs and the table of the benchmark of data; the rest is a run's own stages."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import data


def curve(*golds: float) -> list[dict[str, Any]]:
    return [{"gold_reward_mean": gold, "kl": gold / 4, "pairs": 250} for gold in golds]


def test_data_are_compared_with_own_pairs_seed_by_seed() -> None:
    found = {
        "own pairs": [curve(0.5, 0.6, 0.8), curve(0.5, 0.62, 0.9)],
        "replay": [curve(0.5, 0.6, 0.9), curve(0.5, 0.62, 1.0)],
    }
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in data.table(found, 2, "own pairs").splitlines()
    ]
    assert lines[2] == ["own pairs", "0.610", "0.850 ± 0.635", "", "250", "0.21"]
    assert lines[3] == ["replay", "0.610", "0.950 ± 0.635", "+0.100 ± 0.000", "250", "0.24"]


@pytest.mark.parametrize("compare", data.COMPARED)
def test_all_runs_begin_with_the_same_models(compare: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = data.parse([f"--directory={tmp_path}", f"--compare={compare}"])
    (tmp_path / "offline.jsonl").write_text("{}\n")
    found = set()
    for strategy in options.strategies:
        graph = data.graph_of(options, strategy, 3, tmp_path / "offline.jsonl")
        setup = ("setup/sft", "setup/reward-model/training")
        configs = [graph.nodes[name].config.model_dump(exclude={"output", "model", "pairs"}) for name in setup]
        found.add(repr(configs).replace(str(graph.directory), ""))
    assert len(found) == 1
