"""Bad input through the real command line: exit code 2, one message, no traceback, nothing left behind."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from annotation_world import (
    ROOT,
    make_rollouts,
    publish_rollouts,
    publish_scores,
    run_cli,
)

from contracts.records import Rollout


def written(folder):
    """What is there, but for what Python keeps of a rule's file."""
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


def refused(tmp_path, *arguments):
    before = written(tmp_path)
    result = run_cli(*arguments, f"output={tmp_path / 'output'}", check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    assert written(tmp_path) == before
    return " ".join(result.stderr.split())


@pytest.mark.slow
def test_models_that_are_none(tmp_path, rollouts, models):
    score = ("score", f"rollouts={rollouts.path}", "kind=reward_model")
    assert "with 2 labels" in refused(tmp_path, *score, f"model={models['two_labels']}")
    assert "no classifier" in refused(tmp_path, *score, f"model={models['causal']}")
    assert "does not exist" in refused(tmp_path, *score, f"model={tmp_path / 'missing'}")
    assert "is not a model" in refused(tmp_path, *score, f"model={rollouts.path}")
    assert "needs model=DIRECTORY" in refused(tmp_path, *score)
    too_long = refused(tmp_path, *score, f"model={models['reward']}", "max_length=65")
    assert "max_length is 65 tokens, but the context" in too_long
    bare = shutil.copytree(models["reward"], tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert "has no chat template" in refused(tmp_path, *score, f"model={bare}")
    logprobs = ("score", f"rollouts={rollouts.path}", "kind=logprobs")
    assert "must be a causal language model" in refused(tmp_path, *logprobs, f"model={models['reward']}")


@pytest.mark.slow
def test_a_model_whose_weights_or_scores_are_no_numbers(tmp_path, rollouts, models):
    import torch
    from safetensors.torch import load_file, save_file

    damaged = shutil.copytree(models["reward"], tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    for value, words in ((torch.nan, "NaN or infinite: score.weight"), (3e38, "for prompt")):
        weights["score.weight"] = torch.full_like(weights["score.weight"], value)
        save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
        message = refused(tmp_path, "score", f"rollouts={rollouts.path}", "kind=reward_model", f"model={damaged}")
        assert words in message
    assert any(rollout.prompt_id in message for rollout in rollouts.rows(Rollout))


@pytest.mark.slow
def test_rules_that_fail(tmp_path, rollouts):
    rule = tmp_path / "rule.py"
    rule.write_text(
        "def fails(messages, response, finish_reason, answer): return 1 / 0\n"
        "def text(messages, response, finish_reason, answer): return 'good'\n"
        "def infinite(messages, response, finish_reason, answer): return float('inf')\n"
    )
    score = ("score", f"rollouts={rollouts.path}", "kind=rule")
    message = refused(tmp_path, *score, f"function={rule}:fails")
    assert f"{rule}:fails' failed on prompt" in message
    assert "sample 0: ZeroDivisionError: division by zero" in message
    assert "returned 'good' for prompt" in refused(tmp_path, *score, f"function={rule}:text")
    assert "gave inf for prompt" in refused(tmp_path, *score, f"function={rule}:infinite")
    assert "has no function 'missing'" in refused(tmp_path, *score, f"function={rule}:missing")
    assert "no module or file" in refused(tmp_path, *score, "function=nowhere.at_all:judge")
    assert "Did you mean 'function'?" in refused(tmp_path, *score, f"functon={rule}:text")


def test_pairs_of_single_answers_or_of_other_scores(tmp_path, rollouts):
    single = publish_rollouts(tmp_path / "single", make_rollouts(3, 1))
    scores = publish_scores(tmp_path / "scores", single, lambda *_: 1.0)
    message = refused(tmp_path, "pairs", f"rollouts={single.path}", f"scores={scores.path}")
    assert "at most one completion per prompt" in message
    assert "k=2" in message
    message = refused(tmp_path, "pairs", f"rollouts={rollouts.path}", f"scores={scores.path}")
    assert "was made from other rollouts" in message
    message = refused(tmp_path, "pairs", f"rollouts={scores.path}", f"scores={scores.path}")
    assert "holds scores v1; expected rollouts v1" in message


def test_the_bash_script_runs_a_stage_and_again_reuses_it(tmp_path, rollouts):
    rule = tmp_path / "rule.py"
    rule.write_text("def judge(messages, response, finish_reason, answer):\n    return len(response)\n")
    command = ["bash", "scripts/annotate.sh", "score", f"rollouts={rollouts.path}", "kind=rule"]
    command += [f"function={rule}:judge", f"output={tmp_path / 'a directory'}"]
    environment = {**os.environ, "PYTHON": sys.executable}
    outputs = [
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert outputs[0].startswith("published")
    assert outputs[1].startswith("reuse")
    manifest = json.loads((tmp_path / "a directory/manifest.json").read_text())
    assert manifest["rows"] == 40


@pytest.mark.parametrize("stage", ["rule", "pairs"])
def test_stages_without_a_model_start_at_once(tmp_path, rollouts, stage):
    rule = tmp_path / "rule.py"
    rule.write_text("def judge(messages, response, finish_reason, answer):\n    return len(response)\n")
    scores = publish_scores(tmp_path / "scores", rollouts, lambda _, completion: float(completion.sample))
    arguments = {
        "rule": ["score", f"rollouts={rollouts.path}", "kind=rule", f"function={rule}:judge"],
        "pairs": ["pairs", f"rollouts={rollouts.path}", f"scores={scores.path}"],
    }[stage]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "annotation", *arguments, f"output={tmp_path / 'output'}"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime < 1.5
