"""`pipeline plan`: who runs where and when, and what is refused before anything runs."""

import json
from pathlib import Path

import pytest
from small_stages import without_environments
from test_pipelines_simulated import drive

from pipelines.config.load import load_run_config
from pipelines.insight.plan import timeline, view_plan
from pipelines.main import main
from pipelines.planning.cluster import cluster_of
from pipelines.planning.placement import placed_graph
from pipelines.text import format_ranges


@pytest.fixture(autouse=True)
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    without_environments(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("RATCHET_VARIANT", "auto")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command that finds a mistake of the user's."""
    assert main([*arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 1
    return printed.err


def test_before_a_run_it_counts_in_units(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "plan", "show", str(smallest), "--iters", "2", "placement=separation", "--plain")
    assert "strategy separation; 4 GPUs" in text
    assert "| training                      | 1-2        | local training: 2-3   | dp=2       |" in text
    assert "No durations are known yet" in text
    assert "pool training (2-3): idle" in text
    lanes = [line for line in text.splitlines() if line.startswith("GPU ")]
    assert [lane.split("  ")[0] for lane in lanes] == ["GPU 0-1", "GPU 2-3"]
    assert "[1 " in lanes[0]
    assert "[1 tr" in lanes[1]


def test_once_a_run_has_stages_it_counts_in_their_seconds(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"generation": 0.5, "training": 1.0}
    drive(smallest, recipe=[], seconds=seconds)
    run = smallest.parent / "runs/smallest"
    found = json.loads(said(capsys, "plan", "show", str(run), "--iters", "3", "--json"))
    assert found["unit"] == "seconds"
    stages = {stage["stage"]: stage for stage in found["stages"]}
    third = stages["iteration-003/training"]
    assert third["end"] - third["start"] == pytest.approx(1.0, abs=0.9)
    assert third["measured"]
    assert third["critical"]
    assert found["shortest"] <= found["total"] <= found["alone"] + 1e-6
    assert max(stage["end"] for stage in found["stages"]) == found["total"]
    assert sum(stages[name]["end"] - stages[name]["start"] for name in found["critical"]) <= found["total"] + 1e-6
    again = said(capsys, "plan", "show", str(smallest), "--iters", "3")
    assert "seconds in all" in again, "the same by its config"


def test_a_timeline_shows_parts_that_run_side_by_side(smallest: Path) -> None:
    config = load_run_config(smallest, ["training.algorithm=ppo", "training.settings={}", "placement=interleaving"])
    view = view_plan(placed_graph(config, 1), config, cluster_of(config), [])
    lanes = timeline(view, width=200)
    assert [lane.split("  ")[0] for lane in lanes[1:]] == ["GPU 0-1", "GPU 2", "GPU 3"]
    columns = [lane.index(f"[1 {role}") for lane, role in zip(lanes[1:], ("reward", "refer", "value"), strict=True)]
    assert len(set(columns)) == 1
    (pool,) = view.pools
    assert (pool.name, pool.devices) == ("", [0, 1, 2, 3])
    assert pool.idle == pytest.approx(0.0)


def test_numbers_in_ranges() -> None:
    assert format_ranges([3, 0, 1, 6]) == "0-1, 3, 6"
    assert format_ranges([]) == ""


def test_a_plan_that_can_be_is_said_to_be(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "plan", "check", str(smallest), "placement=interleaving")
    assert "stages have their devices, by placement.strategy=interleaving" in text


@pytest.mark.parametrize("command", ["show", "check"])
@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("placement={strategy: separation, pools: {generation: 4, training: 1}}", "ask for 5 devices up to training"),
        ("placement={strategy: separation, pools: {a: [0, 1], b: [1]}}", "pools.a and pools.b both have device 1"),
        ("placement.stages={refrence: {pool: a}}", "which is not a pool"),
        ("placement.stages={refrence: {layout: {replicas: 2}}}", "Did you mean 'reference'"),
        ("placement=async", "but lag is 0"),
        (
            "placement={strategy: colocated, pools: {generation: 1}}",
            "with placement.strategy=colocated every stage has",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_message(
    smallest: Path, capsys: pytest.CaptureFixture[str], command: str, override: str, complaint: str
) -> None:
    assert complaint in refused(capsys, "plan", command, str(smallest), override)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.parallel.dp=9", "parallel (dp=9) takes 9 GPUs, but there are 4. Set dp, tp, pp or sp"),
        ("training.parallel={tp: 2, pp: 2, dp: 2}", "parallel (dp=2 tp=2 pp=2) takes 8 GPUs, but there are 4. Set dp"),
        ("prompts.train.source=prmpts.jsonl", "prmpts.jsonl does not exist. Give a path that does"),
    ],
)
def test_what_a_run_could_not_have_is_found_by_the_check(
    smallest: Path, capsys: pytest.CaptureFixture[str], override: str, complaint: str
) -> None:
    said = {refused(capsys, *command, str(smallest), override) for command in (["plan", "check"], ["run", "--dry-run"])}
    assert complaint in said.pop()
    assert said == set(), "one refusal, whoever asks"
    assert complaint in refused(capsys, "run", str(smallest), override)
    assert not (load_run_config(smallest, []).run_directory).exists(), "before anything is begun"


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 6, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("placement.stages={training: {layout: {tp: 4}}}", "which does not divide num_key_value_heads (6)"),
        ("placement.stages={training: {layout: {tp: 3}}}", "which does not divide num_attention_heads (32)"),
        ("placement.stages={training: {layout: {pp: 4}}}", "parallel.pp is 4, but"),
        ("generation.tensor_parallel=4", "by which num_key_value_heads (6) of"),
    ],
)
def test_a_layout_that_a_model_cannot_take_is_refused_with_the_number(
    smallest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, complaint: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    header = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    arguments = [str(smallest), f"policy={model}", "sft=null", override]
    assert complaint in refused(capsys, "plan", "check", *arguments)


def test_it_is_made_for_the_machine_that_the_config_is_written_for(
    smallest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_VARIANT", "cpu")
    plan = ["placement={strategy: separation, pools: {generation: 6, training: 2}}", "hardware={gpus: 8, gib: 80}"]
    assert "strategy separation; 8 GPUs" in said(capsys, "plan", "show", str(smallest), *plan)


def test_a_model_that_does_not_fit_is_refused_with_its_estimate(
    smallest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_VARIANT", "cpu")
    monkeypatch.setattr("pipelines.planning.memory.host_memory", lambda: 64 << 20)
    assert "of the CPU of this machine, which has 64.0 MiB free" in refused(capsys, "plan", "check", str(smallest))
