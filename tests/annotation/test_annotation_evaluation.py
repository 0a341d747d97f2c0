"""The evaluate stage: each metric against its definition."""

import json
import math

import pytest
from annotation_world import make_rollouts, publish_rollouts, publish_scores

from annotation.config import EvaluationConfig
from annotation.stages.evaluation import EVALUATE
from contracts.errors import UserError
from contracts.records import Rollout
from contracts.stage import run_stage


def evaluate(output, rollouts, **keys):
    artifact = run_stage(EVALUATE, EvaluationConfig(output=output, rollouts=rollouts.path, **keys))
    metrics = json.loads((output / "evaluation.json").read_text())
    assert metrics == artifact.manifest.facts["metrics"]
    return metrics, artifact


def length(rollout, completion):
    return float(len(completion.response_ids))


def test_the_initial_policy(tmp_path, rollouts):
    rewards = publish_scores(tmp_path / "reward", rollouts, length)
    metrics, artifact = evaluate(tmp_path / "evaluation", rollouts, scores={"reward": rewards.path})
    completions = [completion for rollout in rollouts.rows(Rollout) for completion in rollout.completions]
    mean = sum(len(completion.response_ids) for completion in completions) / 40
    assert metrics["reward_mean"] == metrics["response_length"] == pytest.approx(mean)
    assert metrics["reward_ci95"] > 0
    assert metrics["gold_reward_mean"] is None
    assert metrics["gold_reward_ci95"] is None
    assert (metrics["win_rate"], metrics["kl"], metrics["kl_ci95"], metrics["iteration"]) == (0.5, 0.0, 0.0, 0)
    assert metrics["stop_rate"] == sum(c.finish_reason == "stop" for c in completions) / 40
    assert (metrics["prompts"], metrics["samples"]) == (10, 40)
    assert str(artifact.manifest.ledger) == "40 samples in = 40 kept"


def test_win_rate_kl_and_further_scorers(tmp_path, rollouts):
    initial = publish_rollouts(tmp_path / "initial", make_rollouts(10, 2, seed=7))
    metrics, _ = evaluate(
        tmp_path / "evaluation",
        rollouts,
        iteration=2,
        scores={
            "reward": publish_scores(tmp_path / "reward", rollouts, lambda r, c: float(c.sample)).path,
            "gold": publish_scores(tmp_path / "gold", rollouts, lambda r, c: 0.25).path,
            "form": publish_scores(tmp_path / "form", rollouts, lambda r, c: c.sample % 2 * 1.0).path,
        },
        # two answers of the initial policy: 1 and 2, against 0, 1, 2, 3
        baseline=publish_scores(tmp_path / "baseline", initial, lambda r, c: 1.0 + c.sample).path,
        reference=publish_scores(tmp_path / "ref", rollouts, lambda r, c: math.fsum(c.logprobs) - 0.5 - c.sample).path,
    )
    assert metrics["win_rate"] == (0 + 0 + 0.5 + 0 + 1 + 0.5 + 1 + 1) / 8
    assert metrics["win_rate_prompts"] == 10
    assert metrics["kl"] == pytest.approx(0.5 + 1.5)
    assert metrics["kl_ci95"] == pytest.approx(0, abs=1e-9)
    assert (metrics["gold_reward_mean"], metrics["gold_reward_ci95"], metrics["form_mean"]) == (0.25, 0.0, 0.5)
    assert metrics["iteration"] == 2


def test_a_sample_that_a_scorer_dropped_is_counted(tmp_path, rollouts):
    rewards = publish_scores(tmp_path / "reward", rollouts, lambda r, c: None if c.sample == 1 else 1.0)
    gold = publish_scores(tmp_path / "gold", rollouts, lambda r, c: 1.0 if c.sample == 1 else None)
    metrics, artifact = evaluate(tmp_path / "e", rollouts, scores={"reward": rewards.path, "gold": gold.path})
    assert (metrics["reward_unscored"], metrics["gold_unscored"]) == (10, 30)
    assert str(artifact.manifest.ledger) == "40 samples in = 30 kept + 10 unscored"
    assert metrics["reward_mean"] == 1.0


def test_no_kl_from_samples_at_another_temperature(tmp_path):
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(3, 2, temperature=0.7))
    rewards = publish_scores(tmp_path / "reward", rollouts, length)
    reference = publish_scores(tmp_path / "reference", rollouts, length)
    metrics, _ = evaluate(tmp_path / "e", rollouts, scores={"reward": rewards.path}, reference=reference.path)
    assert metrics["kl"] is None
    assert "temperature=0.7" in metrics["kl_reason"]


def test_the_same_inputs_give_the_same_bytes(tmp_path, rollouts):
    rewards = publish_scores(tmp_path / "reward", rollouts, length)
    digests = {evaluate(tmp_path / name, rollouts, scores={"reward": rewards.path})[1].manifest.digest for name in "ab"}
    assert len(digests) == 1


def test_mistakes(tmp_path, rollouts):
    rewards = publish_scores(tmp_path / "reward", rollouts, length)
    others = publish_rollouts(tmp_path / "others", make_rollouts(2, 2, seed=3))
    foreign = publish_scores(tmp_path / "foreign", others, length)
    with pytest.raises(UserError, match=r"foreign .* was made from other rollouts"):
        evaluate(tmp_path / "e", rollouts, scores={"reward": foreign.path})
    with pytest.raises(ValueError, match="must hold `reward`, found gold"):
        EvaluationConfig(output=tmp_path / "e", rollouts=rollouts.path, scores={"gold": rewards.path})
    another = publish_scores(tmp_path / "another", rollouts, length, key_parts={"inputs": {"model": "x"}})
    with pytest.raises(UserError, match="different scorers"):
        evaluate(tmp_path / "e", rollouts, scores={"reward": rewards.path}, baseline=another.path)
    fresh = [rollout for rollout in make_rollouts(14, 1) if rollout.prompt_id not in
             {known.prompt_id for known in rollouts.rows(Rollout)}]  # fmt: skip
    unrelated = publish_scores(tmp_path / "unrelated", publish_rollouts(tmp_path / "fresh", fresh), length)
    with pytest.raises(UserError, match="no scored prompt in common"):
        evaluate(tmp_path / "e", rollouts, scores={"reward": rewards.path}, baseline=unrelated.path)
