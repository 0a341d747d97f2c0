"""The graph: who needs whom, what runs first, and why a stage runs again."""

import json
from pathlib import Path

import pytest

from contracts.config import Role
from contracts.errors import UserError
from pipelines.config.load import load_run_config
from pipelines.graph import Graph
from pipelines.iteration import build_graph
from pipelines.planning.placement import placed_graph
from pipelines.run.decisions import differences


def graph_of(config: Path, iterations: int, *overrides: str) -> Graph:
    return build_graph(load_run_config(config, list(overrides)), iterations)


def test_an_iteration_reads_the_policy_that_the_last_one_trained(smallest: Path) -> None:
    graph = graph_of(smallest, 2)
    assert graph.nodes["iteration-001/generation"].needs == ("setup/sft", "prompts/train")
    assert graph.nodes["iteration-002/generation"].needs == ("iteration-001/training", "prompts/train")
    training = graph.nodes["iteration-002/training"]
    assert set(training.needs) == {"iteration-001/training", "iteration-002/pairs", "iteration-002/reference"}


def test_a_scorer_runs_in_the_environment_that_it_names(smallest: Path) -> None:
    own = "environments.own={mine: {python: python3}}"
    graph = graph_of(smallest, 1, own, "scorers.gold.environment=mine", "scorers.reward.environment=training")
    found = {node.environment for node in graph.nodes.values() if node.role == "heldout/gold"}
    assert found == {"own.mine"}
    assert {node.environment for node in graph.nodes.values() if node.role == "reward"} == {"training"}
    assert graph.nodes["iteration-001/reference"].environment == "annotation"


def test_a_reward_model_on_vllm_runs_where_vllm_is(smallest: Path) -> None:
    before = graph_of(smallest, 1).nodes["iteration-001/reward"]
    node = graph_of(smallest, 1, "scorers.reward.engine=vllm").nodes["iteration-001/reward"]
    assert (before.environment, node.environment) == ("annotation", "generation")
    assert "vllm" in node.stage.libraries(node.config)
    assert "vllm" not in before.stage.libraries(before.config)
    assert "engine" not in before.config.select(Role.IDENTITY)
    named = graph_of(smallest, 1, "scorers.reward={kind: reward_model, engine: vllm, environment: training}")
    assert named.nodes["iteration-001/reward"].environment == "training"


def test_steps_are_placed_by_the_policys_tokenizer(smallest: Path) -> None:
    reward = "scorers.reward={kind: process_reward, model: ., layout: turns}"
    node = graph_of(smallest, 1, reward, "reward_model=null").nodes["iteration-001/reward"]
    assert node.config.tokenizer == node.config.rollouts.parents[1] / "setup/world/model"


def test_a_combined_reward_is_made_of_scores_of_the_same_answers(smallest: Path) -> None:
    """Also of those that are trained on; held-out answers are judged once by each scorer."""
    reward = "scorers.reward={kind: combined, expression: 'gold + standard(form) - inner'}"
    inner = "scorers.inner={kind: combined, expression: 'rank(form)'}"
    graph = graph_of(smallest, 1, reward, inner, "scorers.form={kind: format}", "reward_model=null")
    roles = {name.removeprefix("iteration-001/") for name in graph.nodes if name.startswith("iteration-001/")}
    assert {"parts/gold", "parts/form", "parts/inner", "reward", "heldout/form", "heldout/inner"} <= roles
    assert not [role for role in roles if role.startswith("heldout/parts")]
    made = graph.nodes["iteration-001/reward"]
    assert set(made.needs) == {
        "iteration-001/generation", "iteration-001/parts/gold", "iteration-001/parts/form", "iteration-001/parts/inner",
        "iteration-000/heldout/form",
    }  # fmt: skip
    assert set(graph.nodes["iteration-001/parts/inner"].needs) == {
        "iteration-001/generation",
        "iteration-001/parts/form",
    }
    assert made.stage.follows(made.config) is None
    assert set(graph.nodes["iteration-000/heldout/reward"].needs) == {
        "iteration-000/heldout/generation", "iteration-000/heldout/gold", "iteration-000/heldout/form",
        "iteration-000/heldout/inner",
    }  # fmt: skip


def test_a_part_of_the_reward_can_be_the_model_that_is_trained_first(smallest: Path) -> None:
    section = "reward_model={prompts: {source: world:preference.jsonl}}"
    reward = "scorers.reward={kind: combined, expression: helpful - form}"
    graph = graph_of(
        smallest, 1, reward, "scorers.helpful={kind: reward_model}", "scorers.form={kind: repetition}", section
    )
    trained = graph.directory / "setup/reward-model/training"
    for name in ("iteration-001/parts/helpful", "iteration-001/heldout/helpful"):
        assert graph.nodes[name].config.model_dump()["model"] == trained
    with pytest.raises(UserError, match=r"but scorers.reward.kind is combined, which reads other models"):
        graph_of(smallest, 1, reward, "scorers.helpful={kind: format}", "scorers.form={kind: repetition}", section)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("gold + from", "not an expression: invalid syntax"),
        (
            "gold + fomr",
            "scorers.reward.expression names fomr, which is not a scorer of this run. Did you mean form? Known: ",
        ),
        ("gold + inner", "scorers.reward is made of itself: reward of inner of reward"),
        ("gold ** 2", "is not allowed"),
    ],
)
def test_a_combined_reward_that_cannot_be_is_refused(smallest: Path, expression: str, message: str) -> None:
    inner = "scorers.inner={kind: combined, expression: reward + form}"
    overrides = [f"scorers.reward={{kind: combined, expression: '{expression}'}}", inner, "scorers.form={kind: format}"]
    with pytest.raises(UserError) as caught:
        graph_of(smallest, 1, *overrides, "reward_model=null")
    assert message in str(caught.value)


def test_an_iteration_knows_where_the_lengths_of_earlier_answers_are(smallest: Path) -> None:
    for lag, expected in ((0, ["002"]), (1, ["002", "001"])):
        graph = graph_of(smallest, 3, f"lag={lag}")
        found = graph.nodes["iteration-003/generation"]
        assert found.config.model_dump()["lengths"] == [
            graph.directory / f"iteration-{one}/generation" for one in expected
        ]
        assert not {f"iteration-{one}/generation" for one in expected} & {*found.needs}
        assert graph.nodes["iteration-001/generation"].config.model_dump()["lengths"] == []


@pytest.mark.parametrize(
    ("reference", "anchor"),
    [("initial", "setup/sft"), ("previous", "iteration-001/training"), ("ema", "iteration-001/ema")],
)
def test_the_reference_is_what_the_config_says(smallest: Path, reference: str, anchor: str) -> None:
    graph = graph_of(smallest, 2, f"reference={reference}")
    assert anchor in graph.nodes["iteration-002/reference"].needs


@pytest.mark.parametrize(("reference", "anchor"), [("initial", "setup/sft"), ("previous", "iteration-001/training")])
def test_a_reference_model_beside_the_policy_needs_no_stage(
    smallest: Path, tmp_path: Path, reference: str, anchor: str
) -> None:
    (tmp_path / "words.json").write_text("[]")
    mine = tmp_path / "mine.py"
    mine.write_text('READS = "pairs"\nNEEDS = ("reference_model",)\ndef loss(batch): ...\n')
    overrides = [f"training.algorithm={mine}", "training.settings={}", f"training.inputs=[{tmp_path}/words.json]"]
    graph = graph_of(smallest, 2, *overrides, f"reference={reference}")
    assert "iteration-002/reference" not in graph.nodes
    training = graph.nodes["iteration-002/training"]
    assert training.config.model_dump()["reference_model"] == graph.nodes[anchor].output
    assert training.config.model_dump()["inputs"] == [tmp_path / "words.json"]
    assert anchor in training.needs
    with pytest.raises(UserError, match=r"parallel \(dp=2 zero=3\) divides the policy"):
        graph_of(smallest, 2, *overrides, "training.parallel={dp: 2, zero: 3}")


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


SAMPLED: dict[str, tuple[str, ...]] = {
    "ppo": ("reference", "values"), "decoupled_ppo": ("reference", "values"), "grpo": ("reference",),
    "rloo": ("reference",), "reinforce_pp": ("reference",), "remax": ("reference", "greedy"), "raft": (),
    "dr_grpo": (), "cispo": (),
}  # fmt: skip
"""What the algorithms need that train on samples."""


@pytest.mark.parametrize("algorithm", SAMPLED)
def test_an_iteration_on_samples(smallest: Path, algorithm: str) -> None:
    """generation -> reward, and what the algorithm needs -> experience -> training, and the critic beside it."""
    graph = graph_of(smallest, 2, f"training.algorithm={algorithm}", "training.settings={}")
    names = [name for name in graph.nodes if name.startswith("iteration-002/") and "/heldout/" not in name]
    needs = SAMPLED[algorithm]
    before = {"iteration-002/generation", "iteration-002/reward"}
    before |= {f"iteration-002/{need}" for need in needs if need != "greedy"}
    greedy = {f"iteration-002/greedy/{name}" for name in ("generation", "reward")} if "greedy" in needs else set()
    after = {f"iteration-002/{name}" for name in ("experience", "training", "evaluation")}
    critic = {"iteration-002/critic"} if "values" in needs else set()
    assert set(names) == before | greedy | after | critic
    assert set(graph.nodes["iteration-002/experience"].needs) == before | greedy
    assert set(graph.nodes["iteration-002/training"].needs) == {"iteration-001/training", "iteration-002/experience"}
    experience = graph.nodes["iteration-002/experience"].config.model_dump()
    assert experience["algorithm"] == algorithm
    for name in ("reference", "values", "greedy"):
        assert (experience[name] is not None) == (name in needs)
    for name in greedy & graph.nodes.keys():
        config = graph.nodes[name].config.model_dump()
        if config.get("policy"):
            sampled = graph.nodes["iteration-002/generation"].config.model_dump()
            assert (config["k"], config["temperatures"]) == (1, [0.0])
            for key in ("policy", "prompts", "start", "count", "max_new_tokens"):
                assert config[key] == sampled[key]


def test_the_critic_of_one_iteration_values_the_next(smallest: Path) -> None:
    graph = graph_of(smallest, 3, "training.algorithm=ppo", "training.settings={}", "critic.learning_rate=1e-5")
    assert set(graph.nodes["iteration-001/values"].needs) == {"setup/reward-model/training", "iteration-001/generation"}
    assert set(graph.nodes["iteration-003/values"].needs) == {"iteration-002/critic", "iteration-003/generation"}
    critic = graph.nodes["iteration-003/critic"]
    assert set(critic.needs) == {"iteration-002/critic", "iteration-003/experience"}
    assert critic.config.model_dump()["learning_rate"] == 1e-5
    assert "iteration-003/critic" not in graph.nodes["iteration-003/training"].needs
    seeds = {graph.nodes[f"iteration-003/{name}"].config.model_dump()["seed"] for name in ("critic", "training")}
    assert len(seeds) == 2


def test_where_the_first_critic_comes_from(smallest: Path, tmp_path: Path) -> None:
    ppo = ["training.algorithm=ppo", "training.settings={}"]
    graph = graph_of(smallest, 2, *ppo, "critic.start=policy")
    assert graph.nodes["setup/critic"].needs == ("setup/sft",)
    assert set(graph.nodes["iteration-001/values"].needs) == {"setup/critic", "iteration-001/generation"}
    graph = graph_of(smallest, 1, *ppo, f"critic.start={tmp_path}")
    assert graph.nodes["iteration-001/critic"].config.model_dump()["model"] == tmp_path
    rule = ["reward_model=null", "scorers.reward={kind: rule, function: embedded.reviews:well_formed}"]
    assert "setup/critic" in graph_of(smallest, 1, *ppo, *rule).nodes
    model = ["reward_model=null", f"scorers.reward={{kind: reward_model, model: {tmp_path}}}"]
    assert graph_of(smallest, 1, *ppo, *model).nodes["iteration-001/values"].config.model_dump()["model"] == tmp_path


def test_a_policy_that_is_its_own_critic(smallest: Path) -> None:
    ppo = ["training.algorithm=ppo", "training.settings={}"]
    graph = graph_of(smallest, 3, *ppo, "training.value_head=true")
    assert not [name for name in graph.nodes if name.endswith("/critic") and name != "setup/critic"]
    assert set(graph.nodes["iteration-001/values"].needs) == {"setup/critic", "iteration-001/generation"}
    assert set(graph.nodes["iteration-003/values"].needs) == {"iteration-002/training", "iteration-003/generation"}
    later = graph_of(smallest, 3, *ppo, "changes={2: {training: {value_head: true}}}")
    assert "iteration-001/critic" in later.nodes
    assert "setup/critic" in later.nodes["iteration-002/values"].needs
    assert "iteration-002/training" in later.nodes["iteration-003/values"].needs


def test_an_adaptive_coefficient_goes_on_from_the_last_iteration(smallest: Path) -> None:
    ppo = ["training.algorithm=ppo", "training.settings={}"]

    def previous(*overrides: str) -> list[str | None]:
        graph = graph_of(smallest, 3, *ppo, *overrides)
        dumps = [graph.nodes[f"iteration-{number:03d}/experience"].config.model_dump() for number in (1, 2, 3)]
        return [dump["previous"] and dump["previous"].parent.name for dump in dumps]

    assert previous() == [None, None, None]
    assert previous("experience.kl_target=6") == [None, "iteration-001", "iteration-002"]
    changed = "changes={3: {experience: {kl_coefficient: 0.2}}}"
    assert previous("experience.kl_target=6", changed) == [None, "iteration-001", None]


def test_settings_of_the_loss_change_no_experience(smallest: Path) -> None:
    ppo = ["training.algorithm=ppo", "training.settings.beta=null"]
    plain = graph_of(smallest, 1, "training.algorithm=ppo", "training.settings={gamma: 0.9}")
    clipped = graph_of(smallest, 1, "training.algorithm=ppo", "training.settings={gamma: 0.9, clip: 0.1}")
    name = "iteration-001/experience"
    assert plain.nodes[name].config == clipped.nodes[name].config
    assert plain.nodes["iteration-001/training"].config != clipped.nodes["iteration-001/training"].config
    with pytest.raises(UserError, match="no setting 'beta'"):
        graph_of(smallest, 1, *ppo)


def test_the_algorithm_can_change_within_a_run(smallest: Path) -> None:
    change = "changes={2: {training: {algorithm: ppo}}}"
    graph = graph_of(smallest, 3, "pairs.strategy=max_min", "training.settings={}", "critic.epochs=2", change)
    assert "iteration-001/pairs" in graph.nodes
    assert "iteration-001/critic" not in graph.nodes
    assert "setup/reward-model/training" in graph.nodes["iteration-002/values"].needs
    assert "iteration-002/critic" in graph.nodes["iteration-003/values"].needs
    simple = graph_of(smallest, 1, "training.algorithm=simpo", "training.settings={}")
    assert "iteration-001/reference" not in simple.nodes


def test_another_scorer_judges_those_whom_a_policy_is_compared_with_anew(smallest: Path) -> None:
    """Once, and only where it is the reward that has changed."""
    first = ["reward_model=null", "scorers.reward={kind: rule, function: embedded.reviews:well_formed}"]
    later = {
        2: {"reward": {"kind": "length"}},
        3: {"reward": {"seconds_per_sample": 5}},
        4: {"gold": {"kind": "length"}},
    }
    changes = json.dumps({str(start): {"scorers": scorers} for start, scorers in later.items()})
    graph = graph_of(smallest, 4, "diagnostics=true", *first, f"changes={changes}")
    configs = [graph.nodes[f"iteration-{number:03d}/evaluation"].config.model_dump() for number in range(1, 5)]
    compared = [
        [config[key].relative_to(graph.directory).as_posix() for key in ("baseline", "previous")] for config in configs
    ]
    assert compared == [
        ["iteration-000/heldout/reward", "iteration-000/heldout/reward"],
        ["iteration-002/heldout/baseline/reward", "iteration-002/heldout/previous/reward"],
        ["iteration-002/heldout/baseline/reward", "iteration-002/heldout/reward"],
        ["iteration-002/heldout/baseline/reward", "iteration-003/heldout/reward"],
    ]
    assert graph.nodes["iteration-002/heldout/baseline/reward"].needs == ("iteration-000/heldout/generation",)


def test_a_scorer_that_has_changed_is_standardised_by_its_own_scores(smallest: Path) -> None:
    """And one that has come later; each judges the first answers once, and one that is as it was does not again."""
    reward = "scorers.reward={kind: combined, expression: 'standard(long) + standard(form)'}"
    first = ["reward_model=null", reward, "scorers.long={kind: length}", "scorers.form={kind: format}"]
    later = {
        2: {"long": {"high": 3}},
        3: {"reward": {"expression": "standard(long) + standard(late)"}, "late": {"kind": "repetition"}},
        4: {"long": {"high": None}},
    }
    changes = json.dumps({str(start): {"scorers": scorers} for start, scorers in later.items()})
    graph = graph_of(smallest, 4, *first, f"changes={changes}")

    def standards(name: str) -> dict[str, str]:
        paths = graph.nodes[name].config.model_dump()["standards"]
        return {scorer: path.relative_to(graph.directory).as_posix() for scorer, path in paths.items()}

    old = {scorer: f"iteration-000/heldout/{scorer}" for scorer in ("long", "form")}
    own = {scorer: f"iteration-00{i}/heldout/standards/{scorer}" for scorer, i in (("long", 2), ("late", 3))}
    wanted = {1: old, 2: {**old, "long": own["long"]}, 3: own, 4: {**own, "long": old["long"]}}
    for iteration, expected in wanted.items():
        assert standards(f"iteration-00{iteration}/reward") == expected
        assert standards(f"iteration-00{iteration}/heldout/reward") == expected
    assert standards("iteration-002/heldout/baseline/reward") == wanted[2]
    assert graph.nodes[own["long"]].needs == ("iteration-000/heldout/generation",)
    made = [name for name in graph.nodes if "/standards/" in name]
    assert made == list(own.values())


def test_labels_of_a_reward_model_cannot_be_standardised(smallest: Path) -> None:
    labels = "scorers.labels={kind: combined, expression: standard(form)}"
    with pytest.raises(UserError, match=r"standard\(form\) goes by the initial policy's held-out answers, which are"):
        graph_of(smallest, 0, labels, "scorers.form={kind: format}", "reward_model.label=labels")


@pytest.mark.parametrize("algorithm", ["dpo", "ppo", "remax"])
def test_no_stage_trains_on_held_out_prompts(smallest: Path, algorithm: str) -> None:
    graph = graph_of(smallest, 2, f"training.algorithm={algorithm}", "training.settings={}")
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


@pytest.mark.parametrize("algorithm", ["dpo", "ppo"])
def test_more_iterations_leave_the_earlier_stages_as_they_are(smallest: Path, algorithm: str) -> None:
    short, long = (graph_of(smallest, number, f"training.algorithm={algorithm}") for number in (1, 3))
    assert all(long.nodes[name].config == node.config for name, node in short.nodes.items())


def test_differences_are_told_in_words() -> None:
    old = {"config": {"beta": 0.1, "k": 4}, "inputs": {"pairs": ["a"]}, "versions": {"torch": "2.12"}, "code": 1}
    new = {"config": {"beta": 0.2, "k": 4}, "inputs": {"pairs": ["b"]}, "versions": {"torch": "2.13"}, "code": 1}
    assert differences(old, new) == ["beta 0.1 → 0.2", "input pairs changed", "version of torch 2.12 → 2.13"]


def test_on_gpus_every_stage_uses_all_of_them_unless_told_otherwise(
    smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    nodes = placed_graph(load_run_config(smallest, ["generation.tensor_parallel=2", "training.parallel.dp=1"]), 1).nodes
    configs = {name: node.config.model_dump() for name, node in nodes.items()}
    assert configs["iteration-001/generation"]["replicas"] == 2
    assert configs["iteration-001/reward"]["replicas"] == 4
    assert configs["iteration-000/heldout/gold"]["replicas"] == 1
    assert configs["iteration-001/training"]["parallel"]["dp"] == 1
    assert configs["setup/sft"]["parallel"]["dp"] == 4
    divided = (
        placed_graph(load_run_config(smallest, ["training.parallel.tp=2"]), 1)
        .nodes["iteration-001/training"]
        .config.model_dump()
    )
    assert (divided["parallel"]["dp"], divided["parallel"]["tp"]) == (2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert placed_graph(load_run_config(smallest, []), 1).nodes["setup/sft"].config.model_dump()["parallel"]["dp"] == 1
