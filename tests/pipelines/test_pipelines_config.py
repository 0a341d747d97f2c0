"""A user's mistakes in a run's config: one clear message, exit code 2, nothing left behind."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml

from contracts.config import PATTERN_DESCRIPTIONS, Section
from contracts.errors import UserError
from pipelines.config.load import load_run_config
from pipelines.config.run import RunConfig
from pipelines.iteration import build_graph
from pipelines.main import main

ROOT = Path(__file__).parents[2]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must fail by the user's mistake, and return its message."""
    assert main(list(arguments)) == 2
    # Preflight says so where it takes longer than a moment, as on a busy machine.
    message = re.sub(r"\Achecking models and data in .* \.\.\.\n", "", capsys.readouterr().err)
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.settings.bta=0.2", "algorithm 'dpo' has no setting 'bta'. Did you mean 'beta'?"),
        ("trainig.settings.beta=0.2", "unknown key 'trainig'. Did you mean 'training'?"),
        ("training.settings.beta=much", "the setting 'beta' is 'much'"),
        ("training.learning_rate=-1", "'training.learning_rate' is -1"),
        ("training.learning_rate=0", "'training.learning_rate' is 0"),
        ("training.learning_rate=.nan", "'training.learning_rate' is nan"),
        ("training.learning_rate=1e999", "'training.learning_rate' is inf"),
        (
            "training.learning_rate=5",
            "smallest.yaml: training: learning_rate is 5: AdamW changes every weight by about",
        ),
        ("environments.training={conda: x, container: y}", "environments.training: conda and container exclude"),
        ("reward_model.training.optimiser=sgd", "Did you mean 'reward_model.training.optimizer'?"),
        ("training.model=m", "unknown key 'training.model'"),
        ("scorers.reward.rollouts=r", "unknown key 'scorers.reward.rollouts'"),
        ("training.weight_decay=10", "'training.weight_decay' is 10"),
        ("training.epochs=0", "'training.epochs' is 0"),
        ("generation.temperatures=[100]", "temperatures [100.0]: above 10 all tokens are almost equally likely"),
        ("training.settings.beta=0", "the setting 'beta' is 0, but must be > 0"),
        ("training.settings.beta=.inf", "the setting 'beta' is inf, but must be a finite number"),
        ("training.settings.label_smoothing=0.5", "'label_smoothing' is 0.5, but must be >= 0, < 0.5"),
        ("changes={2: {training: {settings: {beta: 0}}}}", "the setting 'beta' is 0, but must be > 0"),
        ("training.settings.beta=-1", "the setting 'beta' is -1, but must be > 0"),
        ("pairs.strategy=max_mni", "there is no such strategy. Did you mean 'max_min'?"),
        ("pairs.settings.top=2", "pairs: strategy max_min has no setting 'top'. It has no settings."),
        ("pairs.strategy=mine.py:choose", "no module or file 'mine.py' was found"),
        ("training.algorithm=dop", "there is no algorithm 'dop'. Did you mean 'dpo'?"),
        ("generation.k=1", "generation.k is 1; pairs need at least 2"),
        ("generation.temperatures=[1.0, 0.7, 0.5]", "k=4 cannot be divided equally"),
        ("scorers={gold: {kind: rule, function: rules.py:judge}}", "scorers must hold `reward`"),
        ("scorers.gold.kind=magic", "'scorers.gold.kind' is 'magic'"),
        ("scorers.gold.function=embedded.nowhere:score", "embedded.nowhere"),
        ("reward_model.label=silver", "reward_model.label is 'silver'"),
        ("reference=next", "'reference' is 'next'"),
        ("name=../escape", "'name' is '../escape'"),
        ("world=null", "there is no section `world`"),
        ("prompts=null", "'prompts' is null, but this section is required. Set prompts.heldout; its keys are"),
        ("prompts.heldout=null", "is null, but this section is required. Set prompts.heldout.source; its keys are"),
        ("scorers=null", "'scorers' is null, but entries by name are required. Set scorers.NAME"),
        ("scorers.reward=null", "'scorers.reward' is null, but this section is required. Set scorers.reward.kind"),
        ("gates=null", "'gates' is null, but it holds entries by name. Set gates.NAME, or leave it out"),
        ("generation=null", "'generation' is null, but it is a section. Leave it out to have its defaults"),
        (
            "prompts.heldout={}",
            "'prompts.heldout.source' is required but not set. Set prompts.heldout.source=VALUE: hf:ORG",
        ),
        (
            "gates={sure: {metric: reward_uncertainty, above: 1, do: warn}}",
            "gates.sure.metric is reward_uncertainty, by how much the scorers of an ensemble disagree, but scorers",
        ),
        (
            "pairs={strategy: uncertainty, settings: {parts: [a]}}",
            "the setting parts is ['a'], but must be a list of at least 2 (its default is None)",
        ),
        ("policy=models/nowhere", "models/nowhere does not exist"),
        ("prompts.train.source=nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("executor.kind=cloud", "'executor.kind' is 'cloud'"),
        ("seed=-1", "'seed' is -1"),
        ("training.settings.beta=.inf", "the setting 'beta' is inf"),
        ("training.weight_decay=.inf", "'training.weight_decay' is inf"),
        ("generation.temperatures=[.nan]", "'generation.temperatures.0' is nan"),
        ("scorers.gold.function=embedded.reviews:nothere", "has no function 'nothere'"),
        ("scorers.generation={kind: rule, function: rules.py:judge}", "not generation or reference"),
        ("policy=world:nothere", "the toy task has demonstrations.jsonl"),
        ("policy=rules.py", "rules.py does not exist"),
        ("=1", "cannot read the override"),
        ("generation.k", "cannot read the override"),
        ("name.first=x", "cannot set 'name.first'"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_started(
    smallest: Path, capsys: pytest.CaptureFixture[str], override: str, complaint: str
) -> None:
    assert complaint in fails(capsys, "run", str(smallest), override)
    assert not (smallest.parent / "runs").exists()


RULE = ["reward_model=null", "scorers.reward={kind: rule, function: embedded.reviews:well_formed}"]


@pytest.mark.parametrize(
    ("algorithm", "overrides", "complaint"),
    [
        ("rloo", ["generation.k=1"], "generation.k is 1; training.algorithm=rloo compares the answers to a prompt"),
        ("raft", ["generation.k=1"], "it needs at least 2"),
        ("ppo", ["generation.temperatures=[0.7]"], "at temperatures=[0.7]; training.algorithm=ppo"),
        ("ppo", ["generation.temperatures=[1.0,1.0]"], "leave temperatures out"),
        ("raft", ["generation.top_p=0.9"], "top_p=0.9"),
        ("grpo", ["generation.top_k=5"], "top_k=5"),
        ("ppo", ["generation.min_p=0.1"], "at min_p=0.1; training.algorithm=ppo trains what it sampled from"),
        ("grpo", ["generation.min_new_tokens=4"], "leave min_new_tokens out"),
        ("grpo", ["generation.repetition_penalty=1.1"], "its ratios would be wrong"),
        (
            "raft",
            ["generation.presence_penalty=0.5", "generation.frequency_penalty=-0.5"],
            "leave presence_penalty and frequency_penalty out",
        ),
        ("grpo", ["generation.guided.choice=[yes,no]"], 'guided={"choice": ["yes", "no"]}'),
        ("rloo", ["generation.thinking.tokens=64"], 'thinking={"tokens": 64}'),
        ("ppo", ["accumulate=true"], "Only pairs accumulate"),
        ("process_ppo", [], "scorers.reward.kind=reward_model gives one for the whole answer"),
        ("ppo", ["pairs.strategy=all"], "`pairs` is for algorithms that train on pairs"),
        ("grpo", ["critic.epochs=2"], "`critic` is for algorithms that need a critic,"),
        ("simpo", ["reference=previous"], "`reference` is for algorithms that need a reference policy"),
        ("dpo", ["experience.kl_target=6"], "`experience` is for algorithms that train on samples"),
        ("raft", ["experience.kl_coefficient=0.1"], "algorithm=raft needs no reference"),
        ("ppo", ["training.value_head=true", "critic.epochs=2"], "makes the policy its own critic"),
        ("ppo", ["training.value_head=true", "start=initial"], "makes the policy its own critic"),
        ("grpo", ["training.value_head=true"], "value_head: algorithm=grpo needs no values"),
        ("ppo", ["critic.begin=policy"], "unknown key 'critic.begin'"),
        ("ppo", ["critic.start=nowhere"], "nowhere does not exist"),
        ("ppo", ["critic.start=reward_model", *RULE], "but the scorer `reward` is of the kind rule"),
        ("ppo", ["changes={2: {critic: {start: policy}}}"], "critic.start cannot change within a run"),
        ("ppo", ["experience={kl_target: 6, kl_coefficient: 0}"], "must not begin at 0"),
        ("ppo", ["training.settings.lamda=0.9"], "has no setting 'lamda'. Did you mean 'lam'?"),
    ],
)
def test_what_an_algorithm_cannot_do_is_told_before_anything_is_started(
    smallest: Path, capsys: pytest.CaptureFixture[str], algorithm: str, overrides: list[str], complaint: str
) -> None:
    assert complaint in fails(capsys, "run", str(smallest), f"training.algorithm={algorithm}", *overrides)
    assert not (smallest.parent / "runs").exists()


@pytest.mark.parametrize("algorithm", ["ppo", "remax", "reinforce_pp"])
def test_one_answer_is_enough_for_who_does_not_compare_them(smallest: Path, algorithm: str) -> None:
    overrides = [f"training.algorithm={algorithm}", "generation.k=1", "evaluation.k=2"]
    assert len(build_graph(load_run_config(smallest, overrides), 1).nodes) > 10


def test_missing_and_broken_config_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in fails(capsys, "run", str(tmp_path / "nothing.yaml"))
    (tmp_path / "broken.yaml").write_text("name: [x\n")
    assert "broken.yaml, line 2: not valid YAML" in fails(capsys, "run", str(tmp_path / "broken.yaml"))
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    assert "twice.yaml, line 2: not valid YAML: the key 'seed' occurs twice" in fails(
        capsys, "run", str(tmp_path / "twice.yaml")
    )
    (tmp_path / "loop.yaml").write_text("a: &a [*a]\n")
    assert "contains itself" in fails(capsys, "run", str(tmp_path / "loop.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "not UTF-8" in fails(capsys, "run", str(tmp_path / "latin.yaml"))
    assert "is a directory" in fails(capsys, "run", str(tmp_path))
    assert "does not exist" in fails(capsys, "run", str(tmp_path / "twice.yaml" / "x"))
    assert "is not the directory of a run" in fails(capsys, "status", str(tmp_path))
    assert "is not the directory of a run" in fails(capsys, "compare", str(tmp_path))


def test_a_file_where_the_runs_should_go(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a directory" in fails(capsys, "run", str(smallest), f"directory={smallest}")


def test_damaged_weights_and_missing_tokenizer(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = smallest.parent / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}')
    (model / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    arguments = ["run", str(smallest), f"policy={model}", "sft=null", "world={}"]
    assert "is cut off or damaged" in fails(capsys, *arguments)
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    assert "has no tokenizer" in fails(capsys, *arguments)


def test_a_directory_of_something_else_is_refused(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = smallest.parent / "runs" / "smallest" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("...")
    assert "was not created by a run of Ratchet" in fails(capsys, "run", str(smallest))
    assert [path.name for path in precious.parent.iterdir()] == ["thesis.tex"]


def test_a_policy_that_is_no_model(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (smallest.parent / "empty").mkdir()
    assert "is not a model" in fails(capsys, "run", str(smallest), f"policy={smallest.parent / 'empty'}")


@pytest.mark.parametrize("name", ["quickstart", "smollm2"])
def test_the_recipes_are_valid(root: Path, name: str) -> None:
    config = load_run_config(root / "configs" / f"{name}.yaml", [])
    assert config.name == name


def test_environments_are_there_before_anything_is_written(smallest: Path) -> None:
    def message(*overrides: str) -> str:
        command = [sys.executable, "-m", "pipelines", "run", str(smallest), *overrides]
        environment = {**os.environ, "RATCHET_HOME": str(smallest.parent / "home")}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert result.returncode == 2
        return result.stderr

    assert "pipeline env sync" in message()
    assert "nowhere/python" in message("environments.annotation.python=nowhere/python")
    assert not (smallest.parent / "runs").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.settings.beta=0.3"],
        ["training.algorithm=ppo", "critic.epochs=2", "experience.kl_target=6"],
        ["training.algorithm=grpo"],
    ],
)
def test_the_resolved_config_is_the_same_run(smallest: Path, overrides: list[str]) -> None:
    config = load_run_config(smallest, [*overrides, "evaluation.k=2"])
    assert (config.evaluation.k, config.evaluation.max_new_tokens) == (2, 12)
    resolved = smallest.parent / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    again = load_run_config(resolved, [])
    assert again == config
    assert build_graph(again, 2).nodes == build_graph(config, 2).nodes


def test_another_algorithm_comes_without_the_settings_of_the_one_before(smallest: Path) -> None:
    data = yaml.safe_load(smallest.read_text())
    data["training"]["settings"] = {"beta": 0.3, "label_smoothing": 0.1}
    smallest.write_text(yaml.safe_dump(data))
    assert load_run_config(smallest, []).training.settings == {"beta": 0.3, "label_smoothing": 0.1}
    assert load_run_config(smallest, ["training.algorithm=dpo"]).training.settings["beta"] == 0.3
    other = load_run_config(smallest, ["training.algorithm=ipo", "training.settings.beta=0.5"])
    assert other.training.settings == {"beta": 0.5}
    later = load_run_config(smallest, ["changes.2.training.algorithm=simpo"])
    assert later.at(1).training.settings["beta"] == 0.3
    assert later.at(2).training.settings == {}


def test_another_strategy_of_pairs_comes_without_the_settings_of_the_one_before(smallest: Path) -> None:
    data = yaml.safe_load(smallest.read_text())
    data["pairs"] = {"strategy": "top_k_bottom_k", "settings": {"top": 1}, "margin": 0.1}
    smallest.write_text(yaml.safe_dump(data))
    assert load_run_config(smallest, ["pairs.strategy=top_k_bottom_k"]).pairs.settings == {"top": 1}
    other = load_run_config(smallest, ["pairs.strategy=length_matched"]).pairs
    assert (other.settings, other.margin) == ({}, 0.1)
    later = load_run_config(smallest, ["changes.2.pairs.strategy=max_min"])
    assert (later.at(1).pairs.settings, later.at(2).pairs.settings) == ({"top": 1}, {})


def test_a_scorer_of_another_kind_comes_without_the_keys_of_the_one_before(smallest: Path) -> None:
    words = "{kind: keywords, required: [great], case: true}"
    overrides = [f"changes={{2: {{scorers: {{gold: {words}}}}}, 3: {{scorers: {{gold: {{case: false}}}}}}}}"]
    gate = "{metric: kl, above: 9, do: rollback, changes: {scorers: {gold: {kind: regex, pattern: a.*}}}}"
    config = load_run_config(smallest, [*overrides, f"gates.drift={gate}"])
    found = [config.at(iteration).scorers["gold"].model_dump(exclude_unset=True) for iteration in (1, 2, 3)]
    assert found[0]["kind"] == "rule"
    assert found[1] == {"kind": "keywords", "required": ["great"], "case": True}
    assert found[2] == {**found[1], "case": False}
    assert config.at(2).scorers.keys() == config.at(1).scorers.keys()
    taken_back = config.with_change(3, config.gates["drift"].changes).at(3)
    assert taken_back.scorers["gold"].model_dump(exclude_unset=True) == {"kind": "regex", "pattern": "a.*"}


def numeric_fields(model: type[Section]) -> Iterator[str]:
    """Fields of stages' and runs' configurations that hold a number, and that say nothing of which ones."""
    for name, field in model.model_fields.items():
        is_plain = get_origin(field.annotation) not in (list, dict)
        kinds = {field.annotation, *get_args(field.annotation)} if is_plain else set()
        if kinds & {int, float} and not any(hasattr(rule, key) for rule in field.metadata for key in ("ge", "gt")):
            yield f"{model.__name__}.{name}"


def test_every_number_in_a_configuration_has_limits() -> None:
    todo, found = [Section], set()
    while todo:
        model = todo.pop()
        todo += model.__subclasses__()
        if model.__module__.partition(".")[0] in ("annotation", "embedded", "generation", "pipelines", "training"):
            found |= set(numeric_fields(model))
    # Any seed will do, and any score; a pool's devices are a number or a list, which it checks itself.
    any_will_do = {"shuffle_seed", "found", "absent", "lowest", "highest"}
    assert {name.partition(".")[2] for name in found - {"PoolSection.devices"}} <= any_will_do


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("name=my run", "'name' is 'my run': write a letter or a digit, then also ., _ and -, at most 100 in all."),
        (
            'hooks={"my hook": {function: hooks.py:note}}',
            "hooks: 'my hook' is not a name: write a letter, then letters, digits, _ and -, at most 50 in all.",
        ),
        ("date=tomorrow", "'date' is 'tomorrow': write a day like 2025-07-31."),
    ],
)
def test_what_a_name_may_be_is_said_in_words(smallest: Path, override: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_run_config(smallest, [override])
    assert said in str(refused.value)


def test_all_patterns_of_configurations_are_in_words() -> None:
    """What pydantic says of a text that does not fit is a regular expression."""
    schema = json.dumps(RunConfig.model_json_schema())
    assert (
        set(map(json.loads, re.findall(r'"pattern": ("(?:[^"\\\\]|\\\\.)*")', schema))) <= PATTERN_DESCRIPTIONS.keys()
    )


def test_a_tilde_is_the_home_directory_wherever_a_run_takes_a_path(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, models, functions and files with a section; the stages are told the whole path."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "layout.yaml").write_text("strategy: separation\n")
    (home / "loss.py").write_text((ROOT / "training/algorithms/dpo.py").read_text())
    config = load_run_config(
        smallest,
        [
            "policy=~/model", "prompts.train.source=~/train.jsonl", "scorers.gold.function=~/rules.py:judge",
            "scorers.gold.inputs=[~/words.txt]", "pairs.strategy=~/choice.py:choose", "directory=~/runs",
            "environments.training.python=~/venv/bin/python", "placement=~/layout.yaml",
            "hooks={tell: {function: '~/hooks.py:tell'}}", "training.algorithm=~/loss.py",
        ],
    )  # fmt: skip
    assert (config.policy, config.prompts.sources["train"].source) == (f"{home}/model", home / "train.jsonl")
    gold = config.scorers["gold"].model_dump()
    assert (gold["function"], gold["inputs"]) == (f"{home}/rules.py:judge", [home / "words.txt"])
    assert (config.pairs.strategy, config.directory) == (f"{home}/choice.py:choose", home / "runs")
    assert config.environments.training.python == f"{home}/venv/bin/python"
    assert config.placement.strategy == "separation"
    assert config.hooks["tell"].function == f"{home}/hooks.py:tell"
    assert config.training.algorithm == f"{home}/loss.py"
