"""What a training stage refuses, preflight refuses before anything runs, in the same words."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import dpo_settings, run_here

from contracts.errors import UserError
from contracts.preflight import Conversation, Finding, PreflightRequest, StageRequest, examine
from contracts.records import Message

QUESTION, ANSWER = Message("user", "review the film"), Message("assistant", "the film was good .")


def findings(command: str, made: tuple[str, ...] = (), conversations: Any = (), **config: Any) -> list[Finding]:
    plain = json.loads(json.dumps(config, default=str))
    request = PreflightRequest(
        (StageRequest("iteration-001/training", "training", command, plain, made),), tuple(conversations)
    )
    return examine(request).findings


def errors(*arguments: Any, **config: Any) -> list[str]:
    return [finding.found for finding in findings(*arguments, **config) if finding.level == "error"]


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a parameter to freeze that is none": ("policy", {"frozen": ["nothing_like_it"]}),
    "all parameters frozen": ("reward", {"frozen": ["model", "score"]}),
    "a layer to adapt that is none": ("policy", {"lora": {"rank": 2, "targets": ["no_layer"]}}),
    "a layer that cannot be adapted": ("policy", {"lora": {"rank": 2, "targets": ["norm"]}}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_words_of_the_stage(case: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    stage, changes = REFUSED[case]
    settings = {**dpo_settings(models, pairs, tmp_path / "out"), **changes}
    if stage != "policy":
        del settings["reference"]
    with pytest.raises(UserError) as refusal:
        run_here(stage, **settings)
    assert errors(stage, **settings) == [str(refusal.value)]


def test_a_model_that_is_right(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    settings = dpo_settings(models, pairs, tmp_path / "out", lora={"rank": 2, "targets": ["all-linear"]})
    assert {finding.level for finding in findings("policy", **settings)} == {"ok"}
    assert not tmp_path.joinpath("out").exists()


def test_a_damaged_model_is_found_for_each_use(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(models["tied"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    for stage, settings in {
        "policy": dpo_settings(models, pairs, tmp_path / "out", model=model),
        "value-head": {"model": model, "output": tmp_path / "out"},
    }.items():
        (error,) = errors(stage, **settings)
        assert "with another shape than config.json implies" in error


def test_what_the_run_will_make_is_not_looked_for(pairs: dict[str, Path], tmp_path: Path) -> None:
    settings = dpo_settings({"tied": Path("made-by/policy")}, pairs, tmp_path / "out")
    assert findings("policy", ("model",), **settings) == []


def test_demonstrations_are_rendered(models: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(models["tied"], tmp_path / "model")
    path = model / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    path.write_text(refusal + path.read_text())
    settings = {"model": model, "demonstrations": tmp_path / "demonstrations.jsonl", "output": tmp_path / "out"}
    good = Conversation("demonstrations.jsonl, row 1", "demonstrations", (QUESTION, ANSWER))
    asked = Conversation("prompts.jsonl, row 1", "prompts", (Message("system", "be brief"), QUESTION))
    assert [finding.level for finding in findings("sft", (), (good, asked), **settings)] == ["ok", "ok", "ok"]
    bad = Conversation(
        "demonstrations.jsonl, row 2", "demonstrations", (Message("system", "be brief"), QUESTION, ANSWER)
    )
    (error,) = errors("sft", (), (good, bad), **settings)
    assert "no system role" in error
