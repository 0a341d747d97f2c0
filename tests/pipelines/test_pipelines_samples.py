"""A real iteration of PPO: every stage in its environment, forked off the finished run, whose past it shares."""

from pathlib import Path

import pytest
from pipelines_smallest import FinishedRun, pipeline

from contracts.artifacts import Artifact
from contracts.points import read_points
from contracts.records import EXPERIENCE, ROLLOUTS, SCORES, ExperienceRow, Rollout, Score
from pipelines.run.points import is_evaluation

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def ppo(finished_run: FinishedRun) -> Path:
    """The directory of a run with one iteration of PPO."""
    changes = [
        "training.algorithm=ppo", "training.learning_rate=1e-3", "generation.k=2", "critic.learning_rate=1e-3",
        "critic.global_batch=4", "experience.kl_target=1.0",
    ]  # fmt: skip
    forked = pipeline("fork", str(finished_run.path), "--from-iteration", "1", "--name", "ppo", *changes)
    assert forked.returncode == 0, forked.stderr
    run = finished_run.path.parent / "ppo"
    result = pipeline("run", str(run / "config.yaml"), "--iters", "1")
    assert result.returncode == 0, result.stderr
    return run


def test_the_past_is_shared_and_the_stages_are_those_of_ppo(ppo: Path, finished_run: FinishedRun) -> None:
    assert (ppo / "setup/sft/model.safetensors").samefile(finished_run.path / "setup/sft/model.safetensors")
    published = {path.parent.name for path in (ppo / "iteration-001").glob("*/manifest.json")}
    assert published == {
        "generation", "reward", "reference", "values", "experience", "training", "critic", "evaluation"
    }  # fmt: skip
    rows = {point.iteration: point.metrics for point in read_points(ppo) if is_evaluation(point)}
    assert sorted(rows) == [0, 1]
    assert rows[1]["eval/kl"] != 0


def test_every_number_is_that_of_its_token(ppo: Path) -> None:
    here = ppo / "iteration-001"
    rollouts = {row.prompt_id: row for row in Artifact.open(here / "generation", ROLLOUTS).rows(Rollout)}
    scores = {
        name: {(row.prompt_id, row.sample): row for row in Artifact.open(here / name, SCORES).rows(Score)}
        for name in ("reward", "reference", "values")
    }
    count = 0
    for row in Artifact.open(here / "experience", EXPERIENCE).rows(ExperienceRow):
        rollout = rollouts[row.prompt_id]
        assert row.prompt_ids == rollout.prompt_ids
        for sample in row.samples:
            completion = rollout.completions[sample.sample]
            key = (row.prompt_id, sample.sample)
            assert sample.response_ids == completion.response_ids
            assert sample.behaviour == completion.logprobs
            assert sample.reference == scores["reference"][key].token_logprobs
            assert sample.values == scores["values"][key].token_values
            assert sample.reward == scores["reward"][key].score
            assert sample.returns is not None
            assert len(sample.advantages) == len(sample.returns) == len(sample.response_ids)
            count += 1
    assert count == 24


def test_the_engine_and_the_trainer_say_the_same(ppo: Path) -> None:
    facts = Artifact.open(ppo / "iteration-001/training").manifest.facts
    assert facts["drift"]["fresh"] is True
    assert facts["drift"]["mean"] < 1e-4
    assert facts["drift"]["outside"] == 0
    experience = Artifact.open(ppo / "iteration-001/experience").manifest.facts
    # The policy that sampled is the reference, as different programs compute it.
    assert abs(experience["kl"]) < 1e-3


def test_the_run_verifies_and_is_traced_to_its_samples(ppo: Path) -> None:
    verified = pipeline("verify", str(ppo))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    traced = pipeline("trace", str(ppo / "iteration-001/training"), "--json")
    assert "experience" in traced.stdout
    again = pipeline("run", str(ppo / "config.yaml"), "--iters", "1")
    assert "is finished" in again.stdout
