"""The benchmark against TRL on a tiny budget, and what its workload promises."""

import json
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks import training, workload
from benchmarks.side import Child, Side

TINY = workload.Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocabulary=512)


@pytest.mark.slow
def test_both_sides_of_dpo_compute_the_same_loss(capsys):
    options = "--layers 1 --pairs 2 --answer 8 --short-prompt 4 --repetitions 1".split()
    code = training.main(["dpo_vs_trl_short_prompt", *options, "--python", sys.executable])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = report["comparisons"]["dpo_vs_trl_short_prompt"]
    assert code == 0
    assert report["dpo_vs_trl_short_prompt"] > 0
    assert found["difference"] < 1e-5
    assert found["ours"]["useful_tokens"] == found["trl"]["useful_tokens"]


def test_another_loss_is_no_comparison():
    line = {"useful_tokens": 10, "loss": 0.7}
    assert training.require_same("dpo", line, dict(line)) == 0
    with pytest.raises(RuntimeError, match="do not do the same work"):
        training.require_same("dpo", line, {"useful_tokens": 10, "loss": 0.71})
    with pytest.raises(RuntimeError, match="10 and 11 useful tokens"):
        training.require_same("dpo", line, {"useful_tokens": 11, "loss": 0.7})


def test_a_wheel_that_pip_cannot_get_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("RATCHET_HOME", str(tmp_path))
    monkeypatch.setattr(training, "PPO_VERSION", "0.0.0.dev0")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, f"file://{tmp_path}")
    with pytest.raises(RuntimeError, match="pip cannot download trl"):
        training.get_ppo()


def test_weights_are_counted_right():
    for shape in (TINY, workload.Shape(layers=3, hidden=96, intermediate=160, heads=6, kv_heads=6, vocabulary=128)):
        assert shape.parameters == sum(parameter.numel() for parameter in shape.causal(0).parameters())


def test_the_same_seed_is_the_same_workload():
    made = [workload.pairs(TINY, count=3, prompt=8, answer=8, spread=0.5, seed=seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert made[0][0].useful_tokens == sum(
        len(made[0][0].prompt) + len(answer) for answer in (made[0][0].chosen, made[0][0].rejected)
    )


def test_what_is_excluded_counts_nowhere():
    side = Side.__new__(Side)
    side._phases, side._start = {}, 0.0
    work = side.timed("work", lambda: sum(range(300_000)))
    work()
    counted, start = dict(side._phases), side._start
    side.exclude(work)()
    assert side._phases == counted
    assert side._start > start


@pytest.mark.slow
def test_the_words_of_a_side_that_fails_are_told(tmp_path):
    path = tmp_path / "workload.json"
    path.write_text("{}")
    with pytest.raises(RuntimeError, match="KeyError: 'settings'"):
        Child(sys.executable, "ours_dpo", path, dict(os.environ))
