"""A whole run of real stages in their real environments: what it publishes, and that nothing is made twice or lost."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from pipelines_smallest import COMMAND, SECRET, FinishedRun, pipeline

from contracts.artifacts import Artifact
from contracts.manifest import MANIFEST
from contracts.points import read_points
from contracts.records import PAIRS, PROMPTS, ROLLOUTS, Pair, Prompt, Rollout
from pipelines.config.load import load_run_config
from pipelines.iteration import build_graph
from pipelines.run.points import is_evaluation

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def finished(finished_run: FinishedRun) -> Path:
    """The directory of a run of two iterations that nothing interrupted."""
    assert "Best checkpoint" in finished_run.output
    return finished_run.path


def test_secrets_of_the_environment_are_in_no_file_and_no_process_list(finished_run: FinishedRun) -> None:
    assert any("contracts.warm\0annotation" in line for line in finished_run.command_lines), "stages are forked from it"
    assert not [line for line in finished_run.command_lines if SECRET in line]
    files = [path for path in finished_run.path.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_no_pickle_is_in_the_run_directory(finished: Path) -> None:
    assert not [path for path in finished.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]


def test_metrics_have_every_evaluation_step_shard_and_stage_once(finished: Path, shared_smallest: Path) -> None:
    points = read_points(finished)
    rows = {point.iteration: point.metrics for point in points if is_evaluation(point)}
    assert sorted(rows) == [0, 1, 2]  # the last two may end in any order
    wanted = "reward_mean reward_ci95 gold_reward_mean win_rate kl response_length stop_rate".split()
    assert all(f"eval/{name}" in row for row in rows.values() for name in wanted)
    assert (rows[0]["eval/win_rate"], rows[0]["eval/kl"]) == (0.5, 0.0)
    assert rows[2]["eval/win_rate"] != 0.5
    assert [point.point for point in points] == list(range(len(points)))
    assert len({point.identity for point in points}) == len(points)
    graph = build_graph(load_run_config(shared_smallest, []), 2)
    expected = []
    for node in graph.nodes.values():
        expected.append((node.name, "stage", 0))
        manifest = Artifact.open(node.output).manifest
        expected += [(node.name, "step", step + 1) for step in range(manifest.facts.get("steps", 0))]
        if manifest.schema.name in ("rollouts", "scores"):
            shards = [file for file in manifest.files if file.path.startswith("shard-")]
            expected += [(node.name, "shard", number) for number in range(len(shards))]
    assert sorted((point.stage, point.unit, point.number) for point in points) == sorted(expected)
    steps = [point for point in points if any(name.startswith("train/") for name in point.metrics)]
    assert [point.global_step for point in steps] == list(range(1, len(steps) + 1))
    held_out = [point for point in points if any("/held_out_" in name for name in point.metrics)]
    assert [(point.stage, point.unit) for point in held_out] == [("setup/reward-model/training", "stage")]
    log = (finished / "iteration-002/training/training-log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["loss"] == next(p for p in steps if p.iteration == 2).metrics["train/loss"]


def test_every_count_adds_up_and_every_file_is_as_its_manifest_says(finished: Path, shared_smallest: Path) -> None:
    graph = build_graph(load_run_config(shared_smallest, []), 2)
    for node in graph.nodes.values():
        artifact = Artifact.open(node.output)
        assert artifact.damage() == []
        artifact.manifest.ledger.check()
        assert artifact.manifest.inputs.keys() == artifact.manifest.input_paths.keys()


def test_training_rows_are_generated_rows(finished: Path) -> None:
    """The ids that are trained on are the ids that were sampled; one BOS; EOS exactly where the answer ended."""
    tokenizer = json.loads((finished / "setup/sft/tokenizer_config.json").read_text())
    vocabulary = json.loads((finished / "setup/sft/tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    bos, eos = special[tokenizer["bos_token"]], special[tokenizer["eos_token"]]
    for iteration in (1, 2):
        here = finished / f"iteration-{iteration:03d}"
        generated = {row.prompt_id: row for row in Artifact.open(here / "generation", ROLLOUTS).rows(Rollout)}
        pairs = list(Artifact.open(here / "pairs", PAIRS).rows(Pair))
        assert pairs
        for pair in pairs:
            rollout = generated[pair.prompt_id]
            assert pair.prompt_ids == rollout.prompt_ids
            assert rollout.prompt_ids.count(bos) == 1
            sides = [(pair.chosen_sample, pair.chosen_ids), (pair.rejected_sample, pair.rejected_ids)]
            for sample, ids in sides:
                completion = rollout.completions[sample]
                assert (completion.sample, completion.response_ids) == (sample, ids)
                assert (ids[-1] == eos) == (completion.finish_reason == "stop")
                assert eos not in ids[:-1]
            assert pair.chosen_score > pair.rejected_score


def test_rollouts_name_the_weights_that_made_them(finished: Path) -> None:
    first = Artifact.open(finished / "iteration-001/generation", ROLLOUTS)
    second = Artifact.open(finished / "iteration-002/generation", ROLLOUTS)
    made = Artifact.open(finished / "iteration-001/training").manifest.weights
    assert {row.policy for row in second.rows(Rollout)} == {made}
    assert {row.policy for row in first.rows(Rollout)} == {Artifact.open(finished / "setup/sft").manifest.weights}
    windows = [{row.prompt_id for row in artifact.rows(Rollout)} for artifact in (first, second)]
    assert [len(window) for window in windows] == [12, 12]
    assert not windows[0] & windows[1], "each iteration takes the next prompts"


def test_held_out_prompts_are_not_trained_on(finished: Path) -> None:
    heldout = {row.prompt_id for row in Artifact.open(finished / "prompts/heldout", PROMPTS).rows(Prompt)}
    for place in ("prompts/train", "setup/reward-model/prompts"):
        assert not heldout & {row.prompt_id for row in Artifact.open(finished / place, PROMPTS).rows(Prompt)}


def test_the_same_command_again_does_nothing_and_says_so(finished: Path, shared_smallest: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob(MANIFEST)}
    result = pipeline("run", str(shared_smallest), "--iters", "2")
    assert result.returncode == 0, result.stderr
    assert "is finished" in result.stdout
    assert "run    " not in result.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob(MANIFEST)} == before


def test_a_dry_run_says_what_would_run_and_why(finished: Path, shared_smallest: Path) -> None:
    lines = pipeline(
        "run", str(shared_smallest), "training.settings.beta=0.2", "--iters", "2", "--dry-run"
    ).stdout.splitlines()
    plan = {line.split()[1]: line for line in lines}
    assert plan["iteration-001/reference"].startswith("reuse")
    assert plan["iteration-001/training"].startswith("run")
    assert "beta 0.1 → 0.2" in plan["iteration-001/training"]
    assert plan["iteration-002/generation"].startswith("run")


def test_status_lists_every_stage(finished: Path) -> None:
    result = pipeline("status", str(finished), cwd=finished, env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    assert "nobody drives it" in result.stdout
    assert result.stdout.count("published") >= 25


def test_status_marks_what_was_made_from_what_is_gone(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "smallest")
    shutil.rmtree(run / "iteration-001" / "pairs")
    lines = pipeline("status", str(run)).stdout.splitlines()
    states = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines if line.count("│") > 3}
    assert states["iteration-001/reference"] == states["iteration-001/training"] == "outdated"
    assert states["iteration-001/generation"] == "published"


@pytest.mark.slow
def test_a_second_driver_is_refused(shared_smallest: Path, tmp_path: Path) -> None:
    arguments = ["run", str(shared_smallest), f"directory={tmp_path}"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        next(line for line in first.stdout if line.startswith("run "))
        second = pipeline(*arguments)
        assert second.returncode == 2
        assert f"driven right now by process {first.pid}" in second.stderr
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=200)
        assert first.returncode == 130
