"""`pipeline plan simulate`: how long, at what cost, and what the bottleneck is, before there is a machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from pipelines_smallest import FinishedRun
from test_pipelines_simulation import machines_of

from pipelines.main import main
from pipelines.planning.profiles.datasheets import sheet_of_machines
from pipelines.run.directory import RunDirectory
from pipelines.run.events import StagePublished

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def large(tmp_path: Path) -> list[str]:
    """What makes a recipe of an 8B model plannable where there are neither weights nor a network."""
    arguments = ["llama3-8b-iterative-dpo", f"directory={tmp_path / 'runs'}"]
    for key, name in (("policy", "policy"), ("scorers.reward.model", "reward")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA))
        arguments.append(f"{key}={tmp_path / name}")
    rows = [json.dumps({"prompt": f"{number} " + 300 * "x"}) for number in range(50)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    for which in ("train", "heldout"):
        arguments += [f"prompts.{which}.source={tmp_path / 'prompts.jsonl'}", f"prompts.{which}.column=prompt"]
    (tmp_path / "cluster.yaml").write_text("machines: 8\ngpus: 8\ngpu: H100-SXM\nprice: 2.5\n")
    return arguments


def told(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert main(["plan", "simulate", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_on_machines_that_nobody_has(
    large: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*large, "--iters", "2", "--cluster", str(tmp_path / "cluster.yaml"), "--draws", "20"]
    picture = tmp_path / "plan.svg"
    found = told(capsys, *asked, "training.parallel.dp=64", "--svg", picture)
    assert found["machines"] == "64 GPUs H100-SXM in 8 machines"
    assert found["is_bound"] is False, found["unknown"]
    assert found["finishes"] is True
    assert found["total"] > sum(found["iterations"]) > 0
    assert found["cost"] == pytest.approx(2.5 * 64 * found["total"] / 3600)
    assert found["held"] <= found["owned"]
    assert set(found["known_by"]) <= {"analytic", "scaled", "measured"}
    assert found["predictions"]["iteration-001/training"]["basis"] == "analytic"
    assert found["memory"] < found["memory_room"] == 80e9
    assert found["unused"] == {}
    assert found["draws"]["low"] <= found["draws"]["median"] <= found["draws"]["high"]
    assert picture.read_text().startswith("<svg")
    eight = told(capsys, *asked)
    assert eight["unused"]["training"] == [64, 8], "the recipe says dp: 8"
    assert eight["total"] > found["total"]
    assert main(["plan", "simulate", *asked]) == 0
    assert "bottleneck: " in capsys.readouterr().out


def test_what_it_cannot_know_it_does_not_count_as_nothing(
    large: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policy/config.json").unlink()
    (tmp_path / "policy").rmdir()
    unknown = [argument for argument in large if not argument.startswith("policy=")] + ["policy=hf:nobody/has-this"]
    found = told(capsys, *unknown, "--iters", "1", "--cluster", tmp_path / "cluster.yaml")
    assert found["is_bound"]
    assert "iteration-001/training" in found["unknown"]
    assert main(["plan", "simulate", *unknown, "--iters", "1", "--cluster", str(tmp_path / "cluster.yaml")]) == 0
    said = capsys.readouterr().out
    assert "All times are lower bounds" in said
    assert "at least" in said


def test_a_run_that_hardly_ever_ends_is_told_to_programs_too(
    large: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("machines: 8\ngpus: 8\ngpu: H100-SXM\nhours_between_failures: 0.01\n")
    command = ["plan", "simulate", *large, "--iters", "1", "--draws", "10", "--cluster", str(cluster)]
    assert main(command) == 1
    assert "THIS RUN IS NOT EXPECTED TO FINISH" in capsys.readouterr().out
    assert main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["finishes"] is False


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ("training.parallel.dp=512", "parallel (dp=512 zero=fsdp2 nodes=8) takes 512 GPUs, but there are 64. Set dp"),
        ("training.parallel={dp: 1, pp: 64, zero: 0}", "parallel.pp is 64, but"),
        ("training.parallel={dp: 1, tp: 3, zero: 0}", "parallel.tp · sp is 3, which does not divide num_attention"),
        ("generation.tensor_parallel=128", "tensor_parallel=128 takes 128 GPUs, but there are 64. Set tensor_parallel"),
        ("prompts.train.source=prmpts.jsonl", "prmpts.jsonl does not exist. Give a path that does"),
        ("policy=models/nope", "models/nope does not exist. Give a path that does"),
        ("training.parallel={dp: 64, zero: 0}", "stage iteration-001/training is estimated to take "),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_simulated(
    large: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str, complaint: str
) -> None:
    command = ["plan", "simulate", *large, asked, "--iters", "1", "--cluster", str(tmp_path / "cluster.yaml")]
    assert main(command) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("error: ")) == ("", 1)
    assert complaint in said.err


def test_a_plan_is_not_searched_for_what_is_not_there(
    large: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*large, "policy=models/nope", "--iters", "1", "--cluster", str(tmp_path / "cluster.yaml")]
    assert main(["plan", "search", *asked]) == 2
    assert "models/nope does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("machines: 8\ngpus: 8\ngpu: X1000", "there is no data sheet of 'X1000'"),
        ("machines: 8\ngpu: H100-SXM", "gpus"),
        ("machine: 8\ngpus: 8\ngpu: H100-SXM", "Did you mean 'machines'"),
    ],
)
def test_a_clusters_mistakes_are_told_in_one_message(
    shared_smallest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, complaint: str
) -> None:
    (tmp_path / "cluster.yaml").write_text(content)
    assert main(["plan", "simulate", str(shared_smallest), "--cluster", str(tmp_path / "cluster.yaml")]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("error: ") == 1


def test_what_the_file_says_of_its_gpus_goes_before_the_data_sheet(tmp_path: Path) -> None:
    sheet = sheet_of_machines(machines_of(gib=40, network=100))
    assert (sheet.memory, sheet.network, sheet.devices) == (40 << 30, 100e9, 2)
    assert sheet.link == sheet_of_machines(machines_of()).link


@pytest.mark.slow
def test_a_run_teaches_what_the_next_one_takes(
    finished_run: FinishedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_PROFILES", "off")
    events = RunDirectory(finished_run.path).events()
    took = {event.stage: event.seconds for event in events if isinstance(event, StagePublished)}
    found = told(capsys, finished_run.config, "--iters", "3", "--runs", finished_run.path, "--draws", "10")
    assert not found["is_bound"], found["unknown"]
    assert found["known_by"]["measured"] > 0.5
    assert found["driver"]["start"] > 0
    parts = ("start", "load", "compute", "handoff")
    expected = {name: sum(one[part] for part in parts) for name, one in found["predictions"].items()}
    for stage in ("iteration-001/training", "setup/sft"):
        assert found["predictions"][stage]["basis"] == "measured", stage
    assert 0.5 < sum(expected[stage] for stage in took) / sum(took.values()) < 2
    assert set(found["predictions"]) > set(took), "a third iteration is predicted by the two that were"
