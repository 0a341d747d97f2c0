"""`pipeline run` refuses what a later stage would refuse before the first one starts, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import pytest

from pipelines.config.load import load_run_config
from pipelines.iteration import build_graph
from pipelines.main import main
from pipelines.planning.inspection import differing_probes, differing_vocabularies, request_of, requests_of

SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "review the film:"}]}
PLAIN = {"messages": [{"role": "user", "content": "review the book:"}]}
REFUSAL = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_template_that_refuses_a_turn_of_the_data(
    smallest: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(world, smallest.parent / "model"))
    template = model / "chat_template.jinja"
    template.write_text(REFUSAL + template.read_text())
    train = write(smallest.parent / "train.jsonl", *[PLAIN] * 1, SYSTEM)
    heldout = write(smallest.parent / "heldout.jsonl", {"prompt": "review the meal:"})
    command = [
        "run", str(smallest), f"policy={model}", "sft=null", "reward_model=null", "--iters", "1",
        "scorers.reward={kind: rule, function: embedded.reviews:well_formed}", "prompts.per_iteration=2",
        f"prompts.train.source={train}", f"prompts.heldout.source={heldout}",
    ]  # fmt: skip
    for extra in ([], ["--dry-run"]):
        assert main([*command, *extra]) == 2
        message = capsys.readouterr().err
        assert f"{train}, line 2" in message
        assert "no system role" in message
    assert not (smallest.parent / "runs").exists()


def test_environments_that_read_one_tokenizer_differently() -> None:
    text = "two words"
    one = [{"text": text, "ids": [1, 2], "decoded": text}]
    other = [{"text": text, "ids": [1, 3], "decoded": "twowords"}]
    assert differing_probes({"generation": {"m": one}, "annotation": {"m": one}, "training": {}}) == []
    (finding,) = differing_probes({"generation": {"m": other}, "annotation": {"m": one}})
    assert finding.level == "error"
    assert "'twowords'" in finding.found
    assert "m: the environments generation and annotation read its tokenizer differently" in finding.found


def test_stages_that_are_alike_are_asked_about_once(smallest: Path, world: Path) -> None:
    config = load_run_config(smallest, [f"policy={world}", "sft=null"])
    few, many = (build_graph(config, iterations) for iterations in (2, 9))
    for package in ("generation", "annotation", "training"):
        assert len(requests_of(few, package)) == len(requests_of(many, package))
    # A policy of the run's own is known by the model that it is trained from.
    request = request_of(many.nodes["iteration-009/training"], many)
    assert request.config["model"] == str(world)
    assert request.made == ("model",)


def test_a_critic_that_reads_other_tokens(smallest: Path, world: Path) -> None:
    critic = smallest.parent / "critic"
    overrides = [f"policy={world}", "sft=null", "training.algorithm=ppo", f"critic={{start: {critic}}}"]
    graph = build_graph(load_run_config(smallest, overrides), 2)
    assert differing_vocabularies(graph, {str(world): "a" * 64, str(critic): "a" * 64}) == []
    (finding,) = differing_vocabularies(graph, {str(world): "a" * 64, str(critic): "b" * 64})
    assert finding.level == "error"
    assert f"{critic} (stage iteration-001/values) has another vocabulary" in finding.found
