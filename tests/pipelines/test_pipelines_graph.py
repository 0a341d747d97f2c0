"""The graph: who needs whom, what runs first, and why a stage runs again."""

from pathlib import Path

import pytest

from pipelines.config import load_run_config
from pipelines.decisions import differences
from pipelines.graph import Graph
from pipelines.iteration import build_graph


def graph_of(config: Path, iterations: int, *overrides: str) -> Graph:
    return build_graph(load_run_config(config, list(overrides)), iterations)


def test_an_iteration_reads_the_policy_that_the_last_one_trained(smallest: Path) -> None:
    graph = graph_of(smallest, 2)
    assert graph.nodes["iteration-001/generation"].needs == ("setup/sft", "prompts/train")
    assert graph.nodes["iteration-002/generation"].needs == ("iteration-001/training", "prompts/train")
    training = graph.nodes["iteration-002/training"]
    assert set(training.needs) == {"iteration-001/training", "iteration-002/pairs", "iteration-002/reference"}


@pytest.mark.parametrize(
    ("reference", "anchor"),
    [("initial", "setup/sft"), ("previous", "iteration-001/training"), ("ema", "iteration-001/ema")],
)
def test_the_reference_is_what_the_config_says(smallest: Path, reference: str, anchor: str) -> None:
    graph = graph_of(smallest, 2, f"reference={reference}")
    assert anchor in graph.nodes["iteration-002/reference"].needs


def test_accumulated_pairs_get_their_reference_once_per_reference_model(smallest: Path) -> None:
    fixed = graph_of(smallest, 3, "accumulate=true")
    assert len(fixed.nodes["iteration-003/training"].config.model_dump()["pairs"]) == 3
    assert not [name for name in fixed.nodes if "reference-of" in name]
    moving = graph_of(smallest, 3, "accumulate=true", "reference=previous")
    assert [name for name in moving.nodes if "reference-of" in name] == [
        "iteration-002/reference-of-iteration-001",
        "iteration-003/reference-of-iteration-001",
        "iteration-003/reference-of-iteration-002",
    ]


def test_no_stage_trains_on_held_out_prompts(smallest: Path) -> None:
    graph = graph_of(smallest, 2)
    for node in graph.nodes.values():
        if node.package == "training":
            ancestors, todo = set(), [node.name]
            while todo:
                for needed in graph.nodes[todo.pop()].needs:
                    if needed not in ancestors:
                        ancestors.add(needed)
                        todo.append(needed)
            for name in ancestors - {"prompts/heldout"}:
                assert "/heldout/" not in name
                # The import of other prompts reads the held-out ones, to leave them out.
                assert "prompts/heldout" not in graph.nodes[name].needs or graph.nodes[name].config.stage == "prompts"


def test_training_goes_before_evaluation(smallest: Path) -> None:
    order = [node.name for node in graph_of(smallest, 2).by_urgency()]
    assert order.index("iteration-001/generation") < order.index("iteration-000/heldout/reward")
    assert order.index("iteration-002/generation") < order.index("iteration-001/evaluation")
    assert order[-1] == "iteration-002/evaluation"


def test_more_iterations_leave_the_earlier_stages_as_they_are(smallest: Path) -> None:
    short, long = graph_of(smallest, 1), graph_of(smallest, 3)
    assert all(long.nodes[name].config == node.config for name, node in short.nodes.items())


def test_differences_are_told_in_words() -> None:
    old = {"config": {"beta": 0.1, "k": 4}, "inputs": {"pairs": ["a"]}, "versions": {"torch": "2.12"}, "code": 1}
    new = {"config": {"beta": 0.2, "k": 4}, "inputs": {"pairs": ["b"]}, "versions": {"torch": "2.13"}, "code": 1}
    assert differences(old, new) == ["beta 0.1 → 0.2", "input pairs changed", "version of torch 2.12 → 2.13"]


def test_on_gpus_every_stage_uses_all_of_them_unless_told_otherwise(
    smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    nodes = graph_of(smallest, 1, "generation.tensor_parallel=2", "training.parallel.dp=1").nodes
    configs = {name: node.config.model_dump() for name, node in nodes.items()}
    assert configs["iteration-001/generation"]["replicas"] == 2
    assert configs["iteration-001/reward"]["replicas"] == 4
    assert configs["iteration-000/heldout/gold"]["replicas"] == 1
    assert configs["iteration-001/training"]["parallel"]["dp"] == 1
    assert configs["setup/sft"]["parallel"]["dp"] == 4
    divided = graph_of(smallest, 1, "training.parallel.tp=2").nodes["iteration-001/training"].config.model_dump()
    assert (divided["parallel"]["dp"], divided["parallel"]["tp"]) == (2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert graph_of(smallest, 1).nodes["setup/sft"].config.model_dump()["parallel"]["dp"] == 1
