"""Real iterations by reward models of other kinds: PPO on rewards of steps, and pairs by the scores of vLLM."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pipelines_smallest import SMALLEST, FinishedRun, pipeline

from contracts.artifacts import Artifact
from contracts.records import EXPERIENCE, ROLLOUTS, SCORES, ExperienceRow, Rollout, Score

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


def started_from(run: FinishedRun, folder: Path) -> dict[str, Any]:
    """The beginning of a config that goes on from the policy of a finished run's fine-tuning."""
    setup = run.path / "setup"
    return {
        "directory": str(folder / "runs"),
        "policy": str(setup / "sft"),
        "prompts": {
            "train": {"source": str(setup / "world/train.jsonl")},
            "heldout": {"source": str(setup / "world/heldout.jsonl")},
            "per_iteration": 12,
        },
        "generation": {**SMALLEST["generation"], "k": 2},
    }


def test_ppo_learns_from_the_steps_of_answers(finished_run: FinishedRun, tmp_path: Path) -> None:
    config = started_from(finished_run, tmp_path) | {
        "name": "process",
        "scorers": {
            "reward": {
                "kind": "process_reward",
                "model": str(finished_run.path / "setup/sft"),  # any will do: it says what it would, great or awful
                "separator": " ",
                "marker": ".",
                "good": "great",
                "bad": "awful",
            }
        },
        "training": {**SMALLEST["training"], "algorithm": "process_ppo"},
        "critic": {"global_batch": 4},
        "experience": {"kl_coefficient": 0.1},
    }
    path = tmp_path / "process.yaml"
    path.write_text(yaml.safe_dump(config))
    result = pipeline("run", str(path), "--iters", "1")
    assert result.returncode == 0, result.stderr

    run = tmp_path / "runs/process"
    here = run / "iteration-001"
    scored = Artifact.open(here / "reward", SCORES)
    scores = {(row.prompt_id, row.sample): row for row in scored.rows(Score)}
    assert scored.manifest.facts["steps"] == sum(row.parts["steps"] for row in scores.values()) > len(scores)
    rollouts = {row.prompt_id: row for row in Artifact.open(here / "generation", ROLLOUTS).rows(Rollout)}
    gamma, lam, learned = 1.0, 0.95, 0
    for row in Artifact.open(here / "experience", EXPERIENCE).rows(ExperienceRow):
        for sample in row.samples:
            score, answer = scores[row.prompt_id, sample.sample], rollouts[row.prompt_id].completions[sample.sample]
            assert score.parts["steps"] == len(answer.text.split())
            assert [reward for reward in score.token_rewards if reward] == score.extras["step_scores"]
            penalties = [pi - reference for pi, reference in zip(sample.behaviour, sample.reference, strict=True)]
            rewards = [one - 0.1 * kl for one, kl in zip(score.token_rewards, penalties, strict=True)]
            advantage = following = 0.0
            for place in reversed(range(len(rewards))):
                advantage = rewards[place] + gamma * following - sample.values[place] + gamma * lam * advantage
                following = sample.values[place]
                assert sample.returns[place] == pytest.approx(advantage + following, abs=1e-5)
            learned += 1
    assert learned == len(scores)
    assert (here / "training/model.safetensors").is_file()
    assert pipeline("verify", str(run)).returncode == 0


def test_a_reward_model_on_vllm_gives_the_same_scores(finished_run: FinishedRun, tmp_path: Path) -> None:
    """In the environment that vLLM is in, from preflight on."""
    model = {"kind": "reward_model", "model": str(finished_run.path / "setup/reward-model/training")}
    config = started_from(finished_run, tmp_path) | {
        "name": "pooled",
        "scorers": {"reward": {**model, "engine": "vllm"}, "other": model},
        "training": SMALLEST["training"],
    }
    path = tmp_path / "pooled.yaml"
    path.write_text(yaml.safe_dump(config))
    result = pipeline("run", str(path), "--iters", "1")
    assert result.returncode == 0, result.stderr
    heldout = tmp_path / "runs/pooled/iteration-001/heldout"
    pooled, other = (Artifact.open(heldout / name, SCORES) for name in ("reward", "other"))
    assert pooled.manifest.facts["engine"] == "vllm"
    assert "engine" not in other.manifest.facts
    scores = [{(row.prompt_id, row.sample): row.score for row in each.rows(Score)} for each in (pooled, other)]
    assert scores[0] == {key: pytest.approx(score, abs=1e-4) for key, score in scores[1].items()}
    assert len(scores[0]) == 20
    assert (tmp_path / "runs/pooled/iteration-001/training/model.safetensors").is_file()
