"""Evaluations of the user's own: stages like all others, in environments of the user's own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipelines_slurm_run import digests
from pipelines_smallest import pipeline, write_pretended

from annotation.config import CheckpointEvaluationConfig
from annotation.evaluating.checkpoint_evaluation import run as run_evaluation
from contracts.artifacts import Artifact
from contracts.points import read_points
from contracts.publication import Publication
from contracts.records import CHECKPOINT_EVALUATION
from contracts.stage import Context

EVALS = '''
"""Evaluations of a user."""

import os
import signal
from pathlib import Path


def measure(checkpoint, output, scale=1.0):
    (output / "details").mkdir()
    (output / "details" / "samples.jsonl").write_text("{}\\n")
    weights = (checkpoint / "model.safetensors").read_bytes()
    print("measured", checkpoint)
    return {"acc": scale * len(weights), "size/bytes": len(weights)}


def killed_once(checkpoint, output):
    mark = Path(__file__).with_name("killed")
    (output / f"left-{mark.exists()}").touch()
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"acc": 1}


def fail(checkpoint, output):
    raise KeyError("arc_easy")


def leave(checkpoint, output):
    raise SystemExit(0)


def give(checkpoint, output, what):
    return {"nan": {"acc": float("nan")}, "text": {"acc": "N/A"}, "number": 0.5, "name": {3: 1.0}}[what]


def unplugged(checkpoint, output):
    raise ConnectionResetError("the judge has gone")
'''


class EvaluatedRun:
    """A run whose stages pretend to work, but for the user's own evaluations, which are run as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = write_pretended(folder)
        self.path = folder / "runs" / "pretended"
        (folder / "evals.py").write_text(EVALS)

    def configure(self, **evaluations: dict[str, Any]) -> None:
        config = yaml.safe_load(self.config.read_text())
        config["environments"]["own"] = {"mine": {"python": sys.executable}}
        config["evaluations"] = {name: {"environment": "mine", **section} for name, section in evaluations.items()}
        self.config.write_text(yaml.safe_dump(config))

    def function(self, name: str) -> str:
        return f"{self.folder}/evals.py:{name}"

    def run(self, iterations: int) -> "subprocess.CompletedProcess[str]":
        return pipeline("run", str(self.config), "--iters", str(iterations))


@pytest.mark.slow
def test_every_policy_is_evaluated_by_a_stage_of_its_own(tmp_path: Path, pretended: dict[str, str]) -> None:
    run = EvaluatedRun(tmp_path)
    run.configure(
        lm={"function": run.function("measure"), "settings": {"scale": 2.0}},
        rare={"function": run.function("measure"), "every": 2},
    )
    result = run.run(1)
    assert result.returncode == 0, result.stderr
    own = {f"iteration-00{number}/evaluations/lm" for number in (0, 1)} | {"iteration-000/evaluations/rare"}
    assert digests(run.path).keys() - pretended.keys() == own
    assert {name: digest for name, digest in digests(run.path).items() if name not in own} == pretended

    artifact = Artifact.open(run.path / "iteration-001/evaluations/lm", CHECKPOINT_EVALUATION)
    weights = (run.path / "iteration-001/training/model.safetensors").read_bytes()
    metrics = {"acc": 2.0 * len(weights), "size/bytes": len(weights)}
    assert artifact.manifest.facts["metrics"] == metrics
    assert json.loads((artifact.path / "evaluation.json").read_text()) == metrics
    assert (artifact.path / "files/details/samples.jsonl").read_text() == "{}\n"
    point = next(point for point in read_points(run.path) if point.stage == "iteration-001/evaluations/lm")
    found = {name: value for name, value in point.metrics.items() if name.startswith("eval/")}
    assert found == {f"eval/lm/{name}": value for name, value in metrics.items()}
    assert (point.iteration, point.global_step) == (1, 0)
    assert "measured" in (run.path / "logs/iteration-001/evaluations/lm/attempt-1/stage.log").read_text()
    traces = run.path / "logs/iteration-001/evaluations/lm/attempt-1/traces"
    traces.mkdir()
    (traces / "step-00001-rank-0.json.gz").touch()
    logs = pipeline("logs", str(run.path), "iteration-001/evaluations/lm")
    assert f"==> 1 profiler trace in {traces} <==" in logs.stdout, logs.stderr
    traced = pipeline("trace", str(artifact.path))
    assert "iteration-001/training" in traced.stdout, traced.stderr
    verified = pipeline("verify", str(run.path))
    assert "evaluations/lm" not in verified.stdout, verified.stdout

    (tmp_path / "evals.py").write_text(EVALS.replace("scale * len", "2 * scale * len"))
    result = run.run(1)
    assert {line.split()[1] for line in result.stdout.splitlines() if line.startswith("done")} == own
    assert "function changed" in result.stdout or "evals.py" in result.stdout, result.stdout
    assert Artifact.open(artifact.path).manifest.facts["metrics"]["acc"] == 4.0 * len(weights)


@pytest.mark.slow
def test_a_metric_that_a_gate_asks_for_and_that_is_not_returned(tmp_path: Path) -> None:
    run = EvaluatedRun(tmp_path)
    run.configure(lm={"function": run.function("measure")})
    gate = "gates={worse: {metric: lm/accc, below: -1, difference_to: initial, do: stop}}"
    command = ("run", str(run.config), "--iters", "0")
    result = pipeline(*command, gate)
    assert result.returncode == 2
    assert "returned no metric 'accc', by which a gate decides. Did you mean 'acc'?" in result.stderr
    result = pipeline(*command, gate.replace("accc", "acc"))
    assert result.returncode == 0, result.stderr
    logs = [path.read_text() for path in sorted((run.path / "logs/iteration-000/evaluations/lm").rglob("stage.log"))]
    assert ["measured" in log for log in logs] == [True, False], "what was computed is not computed again"


@pytest.mark.slow
def test_an_evaluation_that_is_killed_or_loses_a_connection_is_tried_again(tmp_path: Path) -> None:
    run = EvaluatedRun(tmp_path)
    run.configure(lm={"function": run.function("killed_once")})
    result = run.run(0)
    assert result.returncode == 0, result.stderr
    assert "retry  iteration-000/evaluations/lm  (was killed by SIGKILL" in result.stdout
    output = run.path / "iteration-000/evaluations/lm"
    assert [path.name for path in (output / "files").iterdir()] == ["left-True"]

    run.configure(lm={"function": run.function("unplugged")})
    result = pipeline("run", str(run.config), "--iters", "0", "executor.retries=1")
    assert result.returncode == 1
    assert result.stdout.count("retry  iteration-000/evaluations/lm") == 1
    assert "the judge has gone" in result.stderr


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Something that has weights."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"init")
    (path / "config.json").write_text("{}")
    (tmp_path / "evals.py").write_text(EVALS)
    return path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["function=evals.py:fail"], "failed on checkpoint: KeyError: 'arc_easy' ("),
        (["function=evals.py:leave"], "failed on checkpoint: SystemExit: 0 ("),
        (["function=evals.py:give", "settings.what=nan"], "returned nan for 'acc'; a metric must be a finite number"),
        (["function=evals.py:give", "settings.what=text"], "returned 'N/A' for 'acc'; a metric must be a finite"),
        (["function=evals.py:give", "settings.what=number"], "returned 0.5; it must return its metrics"),
        (["function=evals.py:give", "settings.what=name"], "returned a metric named 3; a name must be"),
    ],
)
def test_a_function_that_fails_or_returns_something_else_publishes_nothing(
    checkpoint: Path, keys: list[str], message: str
) -> None:
    command = [sys.executable, "-m", "annotation", "evaluate-checkpoint", "checkpoint=checkpoint", "output=out", *keys]
    result = subprocess.run(command, cwd=checkpoint.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert f"error: function {keys[0].removeprefix('function=')!r} {message}" in result.stderr
    assert not (checkpoint.parent / "out").exists()


def test_a_kill_while_files_are_published_has_the_function_not_called_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CheckpointEvaluationConfig(
        checkpoint=checkpoint, output=checkpoint.parent / "out", function=f"{checkpoint.parent}/evals.py:measure"
    )
    publication = Publication(config.output, CHECKPOINT_EVALUATION, config.stage, "0" * 64)
    publication.begin()
    with monkeypatch.context() as patch:
        patch.setattr(Publication, "commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(config, Context(publication, 0, 1))
    size = (checkpoint / "model.safetensors").stat().st_size
    (checkpoint / "model.safetensors").unlink()  # which the function would not survive
    outcome = run_evaluation(config, Context(publication, 0, 1))
    assert outcome.facts["metrics"]["acc"] == size
    assert set(publication.receipts()) == {"evaluation.json", "files/details/samples.jsonl"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluations": {"lm": {"function": "evals.py:measured"}}}, "has no function 'measured'"),
        (
            {"evaluations": {"lm": {"function": "evals.py:give"}}},
            "takes (checkpoint, output, what), but is called as give(checkpoint, output): missing a required argument",
        ),
        (
            {"evaluations": {"lm": {"function": "evals.py:fail", "environment": "mine"}}},
            "evaluations.lm.environment is 'mine', which is not one of generation, annotation, training",
        ),
        (
            {"scorers": {"reward": {"kind": "rule", "function": "evals.py:fail", "environment": "mine"}}},
            "scorers.reward.environment is 'mine', which is not one of generation, annotation, training",
        ),
        (
            {"evaluations": {"reward": {"function": "evals.py:fail"}}},
            "evaluations.reward: eval/reward/... are the metrics of another stage already",
        ),
        ({"environments": {"own": {"mine": {"prologue": "true"}}}}, "mine has no python, conda or container"),
        ({"environments": {"own": {"training": {"python": "python3"}}}}, "training is an environment already"),
        (
            {
                "evaluations": {"lm": {"function": "evals.py:fail", "environment": "mine"}},
                "environments": {"own": {"mine": {"python": "/nowhere/python"}}},
            },
            "environments.own.mine.python is '/nowhere/python', which is not an executable file",
        ),
    ],
)
def test_mistakes_are_told_before_the_run_starts(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run = EvaluatedRun(tmp_path)
    config = yaml.safe_load(run.config.read_text())
    config["environments"] |= change.pop("environments", {})
    run.config.write_text(yaml.safe_dump({**config, **change}))
    result = pipeline("run", str(run.config), cwd=tmp_path)
    assert result.returncode == 2, result.stdout
    assert message in result.stderr
    assert not run.path.exists()
