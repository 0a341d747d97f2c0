"""Data over iterations: where an iteration's prompts and pairs come from, in the graph."""

from pathlib import Path
from typing import Any

import pytest

from contracts.errors import UserError
from pipelines.config.load import load_run_config
from pipelines.graph import Graph
from pipelines.iteration import build_graph
from pipelines.planning.estimates import GraphOutlook
from pipelines.planning.iterations import curriculum_beyond_run, require_iterations

MIXTURE = (
    "prompts.train=null",
    "prompts.mixture={reviews: {source: 'world:train.jsonl', weight: 3}, more: {source: 'world:preference.jsonl'}}",
)


def graph_of(config: Path, iterations: int, *overrides: str) -> Graph:
    return build_graph(load_run_config(config, list(overrides)), iterations)


def fields_of(graph: Graph, name: str) -> dict[str, Any]:
    return graph.nodes[name].config.model_dump()


def test_a_mixture_is_drawn_for_each_iteration(smallest: Path) -> None:
    graph = graph_of(smallest, 2, *MIXTURE)
    sources = {name: graph.directory / f"prompts/train/{name}" for name in ("reviews", "more")}
    assert fields_of(graph, "prompts/train/more")["exclude"] == [graph.directory / "prompts/heldout"]
    first, second = (fields_of(graph, f"iteration-00{number}/prompts") for number in (1, 2))
    assert (first["sources"], first["count"], first["after"]) == (sources, 12, None)
    assert first["weights"] == {"reviews": 3, "more": 1}
    assert second["after"] == graph.directory / "iteration-001/prompts"
    sampled = fields_of(graph, "iteration-002/generation")
    assert sampled["prompts"] == graph.directory / "iteration-002/prompts"
    assert (sampled["start"], sampled["count"]) == (0, None)
    answers = GraphOutlook(graph).answers_of(graph.directory / "iteration-002/generation")
    assert answers is None or answers.prompts.count == 12


def test_greedy_answers_are_to_the_same_prompts(smallest: Path) -> None:
    graph = graph_of(smallest, 1, *MIXTURE, "training.algorithm=remax", "training.settings={}")
    names = ("generation", "greedy/generation")
    assert len({fields_of(graph, f"iteration-001/{name}")["prompts"] for name in names}) == 1


def test_a_curriculum_knows_the_scores_that_its_policy_has_waited_for(smallest: Path) -> None:
    graph = graph_of(smallest, 4, "prompts.curriculum={low: 0}", "lag=1")
    histories = [fields_of(graph, f"iteration-00{number}/prompts")["history"] for number in (1, 2, 3, 4)]
    assert [[path.parent.name for path in history] for history in histories] == [
        [], [], ["iteration-001"], ["iteration-001", "iteration-002"],
    ]  # fmt: skip
    last = graph_of(smallest, 4, "prompts.curriculum={low: 0, iterations: 1}")
    assert fields_of(last, "iteration-004/prompts")["history"] == [last.directory / "iteration-003/reward"]


def test_without_them_the_graph_is_what_it_was(smallest: Path) -> None:
    graph = graph_of(smallest, 2)
    assert "iteration-001/prompts" not in graph.nodes
    assert fields_of(graph, "iteration-002/generation")["start"] == 12


def names_of(paths: list[Path]) -> list[str]:
    return [path.relative_to(path.parents[1]).as_posix().removeprefix("iteration-00") for path in paths]


def test_replay_takes_less_of_older_pairs(smallest: Path) -> None:
    graph = graph_of(smallest, 4, "replay={iterations: 2, decay: 0.5}")
    training = fields_of(graph, "iteration-004/training")
    assert names_of(training["pairs"]) == ["4/replay-of-iteration-002", "4/replay-of-iteration-003", "4/pairs"]
    assert names_of(training["reference"]) == ["2/reference", "3/reference", "4/reference"]
    parts = [fields_of(graph, f"iteration-00{number}/replay-of-iteration-002") for number in (3, 4)]
    assert [part["share"] for part in parts] == [0.5, 0.25]
    assert parts[0]["seed"] == parts[1]["seed"]
    everything = graph_of(smallest, 3, "replay={decay: 1}")
    assert fields_of(everything, "iteration-003/training") == fields_of(
        graph_of(smallest, 3, "accumulate=true"), "iteration-003/training"
    )


@pytest.mark.parametrize(
    "further",
    [
        ["training.algorithm=decoupled_ppo"],
        [
            "training.algorithm=grpo",
            "training.correction={level: token, treatment: truncate, high: 2}",
        ],
    ],
)
def test_replay_of_samples(smallest: Path, further: list[str]) -> None:
    graph = graph_of(smallest, 3, "replay={iterations: 1, decay: 0.25}", *further, "training.settings={}")
    assert "iteration-001/replay/rollouts" not in graph.nodes
    replayed = fields_of(graph, "iteration-003/replay/rollouts")
    assert names_of(replayed["rounds"] + replayed["earlier"]) == ["3/generation", "2/generation"]
    assert (replayed["shares"], replayed["margin"]) == ([0.25], None)
    experience = fields_of(graph, "iteration-003/experience")
    found = [experience[name] for name in ("rollouts", "rewards")]
    assert found == [graph.directory / f"iteration-003/replay/{name}" for name in ("rollouts", "reward")]


def test_replayed_pairs_get_their_own_reference_where_it_moves(smallest: Path) -> None:
    graph = graph_of(smallest, 2, "replay={}", "reference=previous")
    own = fields_of(graph, "iteration-002/reference-of-replay-of-iteration-001")
    assert names_of([own["pairs"], own["rollouts"]]) == ["2/replay-of-iteration-001", "1/generation"]


def test_offline_pairs_are_imported_once_and_mixed_into_every_iteration(smallest: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "so?", "chosen": "good", "rejected": "bad"}\n')
    graph = graph_of(smallest, 2, f"offline={{source: {tmp_path}/pairs.jsonl, share: 0.2}}")
    imported = fields_of(graph, "setup/offline/rollouts")
    assert imported["tokenizer"] == graph.directory / "setup/world/model"
    assert imported["exclude"] == [graph.directory / "prompts/heldout"]
    assert fields_of(graph, "setup/offline/scores")["source"] == tmp_path / "pairs.jsonl"
    first, second = (fields_of(graph, f"iteration-00{number}/offline") for number in (1, 2))
    assert first["seed"] != second["seed"]
    assert (second["share"], second["beside"]) == (0.2, graph.directory / "iteration-002/pairs")
    training = fields_of(graph, "iteration-002/training")
    assert names_of(training["pairs"]) == ["2/pairs", "2/offline"]
    assert names_of(training["reference"]) == ["2/reference", "2/reference-of-offline"]


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_dynamic_sampling_is_rounds_of_sampling_and_scoring(smallest: Path, algorithm: str) -> None:
    options = ("prompts.dynamic_sampling={rounds: 2, margin: 0.5}", f"training.algorithm={algorithm}")
    graph = graph_of(smallest, 2, *options, "training.settings={}")
    third = fields_of(graph, "iteration-002/round-3/prompts")
    assert names_of(third["replaces"]) == ["2/prompts", "2/round-2/prompts".removeprefix("2/")]
    assert [path.parent.name for path in third["judged"]] == ["iteration-002", "round-2"]
    assert third["after"] == graph.directory / "iteration-002/round-2/prompts"
    assert fields_of(graph, "iteration-002/prompts")["after"] == graph.directory / "iteration-001/round-3/prompts"
    selected = graph.directory / "iteration-002/selected/rollouts"
    assert len(fields_of(graph, "iteration-002/selected/rollouts")["rounds"]) == 3
    reader = fields_of(graph, "iteration-002/" + ("pairs" if algorithm == "dpo" else "experience"))
    assert (reader["rollouts"], fields_of(graph, "iteration-002/reference")["rollouts"]) == (selected, selected)
    assert (reader.get("scores") or reader["rewards"]) == graph.directory / "iteration-002/selected/reward"
    seeds = {fields_of(graph, f"iteration-002/{role}generation")["seed"] for role in ("", "round-2/", "round-3/")}
    assert len(seeds) == 3
    sampler = graph.sampler(selected)
    assert sampler is not None
    assert sampler.name == "iteration-002/generation"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([MIXTURE[1]], "not both"),
        (["prompts.train=null"], "and here are neither"),
        (["prompts.train=null", "prompts.mixture={}"], "'prompts.mixture' is {}"),
        ([*MIXTURE, "prompts.per_iteration=null"], "with mixture the prompts of each iteration are drawn"),
        ([*MIXTURE, "prompts.mixture.more.weight=0"], "'prompts.mixture.more.weight' is 0: "),
        ([*MIXTURE, "prompts.mixture.more.wieght=2"], "Did you mean 'prompts.mixture.more.weight'?"),
        (["prompts.curriculum={lwo: 0}"], "Did you mean 'prompts.curriculum.low'?"),
        (["prompts.dynamic_sampling={}", "prompts.per_iteration=null"], "with dynamic_sampling the prompts"),
        (["prompts.dynamic_sampling={rounds: 0}"], "'prompts.dynamic_sampling.rounds' is 0"),
        (
            ["prompts.dynamic_sampling={}", "training.algorithm=remax", "training.settings={}"],
            "compares them with a greedy one",
        ),
        (["replay={}", "accumulate=true"], "set one of the two"),
        (["replay={decay: 0}"], "'replay.decay' is 0"),
        (
            ["replay={}", "training.algorithm=grpo", "training.settings={}"],
            "replay is set, but training.algorithm=grpo expects samples of the policy that it trains",
        ),
        (
            [
                "replay={}",
                "training.algorithm=remax",
                "training.settings={}",
                "training.correction={level: token, treatment: truncate}",
            ],
            "which those have not",
        ),
        (["offline={source: x.jsonl}", "training.algorithm=rloo", "training.settings={}"], "offline is about pairs"),
        (["changes={2: {offline: {share: 0.5}}}"], "offline cannot change"),
        (["changes={2: {prompts: {curriculum: {low: 1}}}}"], "prompts.curriculum cannot change"),
    ],
)
def test_bad_input(smallest: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refusal:
        graph_of(smallest, 2, *overrides)
    assert said in str(refusal.value)


def test_a_curriculum_that_no_iteration_has_scores_for_is_a_warning(smallest: Path) -> None:
    config = load_run_config(smallest, ["prompts.curriculum={low: 0}", "lag=1"])
    assert "none has the scores of an earlier one" in str(curriculum_beyond_run(config, 2))
    assert curriculum_beyond_run(config, 3) is None
    assert curriculum_beyond_run(load_run_config(smallest, []), 1) is None


def test_a_history_of_thousands_is_refused(smallest: Path) -> None:
    for key, value in (("prompts.curriculum", "{low: 0}"), ("replay", "{}")):
        config = load_run_config(smallest, [f"{key}={value}"])
        with pytest.raises(UserError, match=f"set {key}.iterations"):
            require_iterations(config, 5000)
    require_iterations(load_run_config(smallest, ["prompts.curriculum={low: 0, iterations: 3}"]), 5000)
