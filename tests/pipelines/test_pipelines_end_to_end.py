"""A whole run of real stages in their real environments: what it publishes, and that nothing is made twice or lost."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from contracts.artifacts import MANIFEST, Artifact
from contracts.records import PAIRS, PROMPTS, ROLLOUTS, Pair, Prompt, Rollout
from pipelines.config import load_run_config
from pipelines.iteration import build_graph
from pipelines.supervisor import RUN, end_orphans

pytestmark = pytest.mark.timeout(900)
COMMAND = [sys.executable, "-m", "pipelines"]
SECRET = "hf_" + "QqSecretQq" * 4
command_lines: set[str] = set()


def pipeline(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=800, check=False, **options)  # type: ignore[call-overload, no-any-return]


def digests(run: Path) -> dict[str, str]:
    """Content digest of every artifact of a run, by place."""
    return {
        path.parent.relative_to(run).as_posix(): Artifact.open(path.parent).manifest.digest
        for path in sorted(run.rglob(MANIFEST))
    }


@pytest.fixture(scope="module")
def finished(shared_smallest: Path) -> Path:
    """The directory of a run of two iterations that nothing interrupted."""
    done = threading.Event()
    watcher = threading.Thread(target=watch_process_list, args=(done,))
    watcher.start()
    environment = {**os.environ, "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}
    result = pipeline("run", str(shared_smallest), "--iters", "2", env=environment)
    done.set()
    watcher.join()
    assert result.returncode == 0, result.stderr
    assert "Best checkpoint" in result.stdout
    return shared_smallest.parent / "runs" / "smallest"


def watch_process_list(done: threading.Event) -> None:
    """Collect all command lines that show up on this machine."""
    while not done.wait(0.05):
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command_lines.add((folder / "cmdline").read_text(errors="replace"))


def test_secrets_of_the_environment_are_in_no_file_and_no_process_list(finished: Path) -> None:
    assert any("iteration-002" in line for line in command_lines)
    assert not [line for line in command_lines if SECRET in line]
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_no_pickle_is_in_the_run_directory(finished: Path) -> None:
    assert not [path for path in finished.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]


def test_metrics_have_one_row_per_policy(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    wanted = {"reward_mean", "reward_ci95", "gold_reward_mean", "win_rate", "kl", "response_length", "stop_rate"}
    assert all(wanted <= row.keys() for row in rows)
    assert (rows[0]["win_rate"], rows[0]["kl"]) == (0.5, 0.0)
    assert rows[2]["win_rate"] != 0.5
    assert Path(rows[2]["policy"]) == finished / "iteration-002" / "training"


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
    lines = pipeline("run", str(shared_smallest), "training.beta=0.2", "--iters", "2", "--dry-run").stdout.splitlines()
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


def test_status_marks_what_was_made_from_what_is_gone(finished: Path) -> None:
    pairs, aside = finished / "iteration-001" / "pairs", finished / "iteration-001" / "pairs-aside"
    pairs.rename(aside)
    try:
        lines = pipeline("status", str(finished)).stdout.splitlines()
    finally:
        aside.rename(pairs)
    states = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines if line.count("│") > 3}
    assert states["iteration-001/reference"] == states["iteration-001/training"] == "outdated"
    assert states["iteration-001/generation"] == "published"


def kill_stage(run: Path, chance: random.Random) -> None:
    """SIGKILL one process of the run, chosen at random among all of them but the driver."""
    mark = f"{RUN}={run}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    if found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(sorted(found)), signal.SIGKILL)


@pytest.mark.parametrize("victim", ["driver", "stage"])
def test_killed_again_and_again_it_ends_with_the_same_bytes(finished: Path, shared_smallest: Path, victim: str) -> None:
    chance = random.Random(victim)
    home = shared_smallest.parent / f"killed-{victim}"
    arguments = ["run", str(shared_smallest), "--iters", "2", f"directory={home}"]
    for _ in range(5):
        with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None
            # Wait for a stage to start, so that every kill finds something to interrupt.
            for line in driver.stdout:
                if line.startswith("run ") and "setup" not in line:
                    break
            time.sleep(chance.uniform(0, 6))
            if victim == "driver":
                driver.kill()
            else:
                kill_stage(home / "smallest", chance)
            driver.communicate(timeout=600)
    result = pipeline(*arguments)
    assert result.returncode == 0, result.stderr
    assert digests(home / "smallest") == digests(finished)
    assert end_orphans(home / "smallest") == []
    strays = [path for path in home.rglob("*") if path.name.endswith(".tmp") or ".partial-" in path.name]
    assert strays == []
    shutil.rmtree(home)


def test_a_second_driver_is_refused(finished: Path, shared_smallest: Path) -> None:
    arguments = ["run", str(shared_smallest), "--iters", "3"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        next(line for line in first.stdout if line.startswith("run "))
        second = pipeline(*arguments)
        assert second.returncode == 2
        assert f"driven right now by process {first.pid}" in second.stderr
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
        assert first.returncode == 130
