"""A run whose reward model compares two answers: its graph, what is refused, and its estimates."""

from pathlib import Path

import pytest

from annotation.scorers.pairwise import PairwiseConfig
from contracts.errors import UserError
from pipelines.config.load import load_run_config
from pipelines.graph import Graph
from pipelines.iteration import build_graph
from pipelines.planning.estimates import GraphOutlook, memory
from training.config import RewardConfig

PAIRWISE = ("scorers.reward.kind=pairwise", "reward_model.training.kind=pairwise")


def graph_of(config: Path, iterations: int, *overrides: str) -> Graph:
    return build_graph(load_run_config(config, list(overrides)), iterations)


def reward_scores(graph: Graph, name: str) -> PairwiseConfig:
    config = graph.nodes[name].config
    assert isinstance(config, PairwiseConfig)
    return config


def test_answers_are_compared_with_each_other_and_held_out_ones_with_the_first_policys(smallest: Path) -> None:
    graph = graph_of(smallest, 2, *PAIRWISE)
    made = graph.nodes["setup/reward-model/training"]
    assert isinstance(made.config, RewardConfig)
    assert made.config.kind == "pairwise"
    first = graph.nodes["iteration-000/heldout/generation"].output
    for iteration in (1, 2):
        here = f"iteration-{iteration:03d}"
        scores = reward_scores(graph, f"{here}/reward")
        assert (scores.kind, scores.model, scores.against) == ("pairwise", made.output, None)
        assert reward_scores(graph, f"{here}/heldout/reward").against == first
        assert "iteration-000/heldout/generation" in graph.nodes[f"{here}/heldout/reward"].needs
    assert reward_scores(graph, "iteration-000/heldout/reward").against == first


def test_a_greedy_answer_is_compared_with_the_sampled_ones(smallest: Path) -> None:
    graph = graph_of(smallest, 1, *PAIRWISE, "training.algorithm=remax", "training.settings={}")
    against = reward_scores(graph, "iteration-001/greedy/reward").against
    assert against == graph.nodes["iteration-001/generation"].output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (PAIRWISE[:1], "Set scorers.reward.kind=reward_model"),
        (PAIRWISE[1:], "Set scorers.reward.kind=pairwise"),
        ((*PAIRWISE, "generation.k=1", "training.algorithm=ppo", "training.settings={}"), "so it needs at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(smallest: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        graph_of(smallest, 1, *overrides)


def test_the_critic_of_a_run_without_a_classifier_starts_from_the_policy(smallest: Path) -> None:
    graph = graph_of(smallest, 1, *PAIRWISE, "training.algorithm=ppo", "training.settings={}")
    assert "setup/critic" in graph.nodes["iteration-001/values"].needs


def test_a_pairwise_model_is_estimated_as_a_language_model_that_reads_two_answers(smallest: Path) -> None:
    plain, compared = graph_of(smallest, 1), graph_of(smallest, 1, *PAIRWISE)
    name = "setup/reward-model/training"
    made, start = compared.nodes[name].output, compared.nodes["setup/sft"].output
    assert GraphOutlook(compared).size_of(made) == GraphOutlook(compared).size_of(start)
    assert GraphOutlook(plain).size_of(plain.nodes[name].output) != GraphOutlook(plain).size_of(start)
    for stage, grows in ((name, True), ("iteration-001/reward", True), ("iteration-001/reference", False)):
        one, other = (memory(graph.nodes[stage], graph, on_gpu=True) for graph in (plain, compared))
        assert one is not None
        assert other is not None
        assert (other.parts["activations"] > one.parts["activations"]) == grows
        assert "logits" in other.parts
