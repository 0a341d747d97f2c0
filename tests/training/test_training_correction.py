"""Importance correction: the weights by hand, what they do to a loss, and that TRL's do the same."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_here, training_log
from safetensors.torch import load_file
from test_training_algorithms_samples import Data, same, trl_inputs, trl_stub
from test_training_policy import experience, make_experience, settings_for

from contracts.errors import UserError
from modeling.rows import Response
from training.config import CorrectionSection
from training.correction import correct, ratios_of, weights_of

__all__ = ["experience"]
LOG2 = math.log(2)


def response(*log_ratios: float) -> Response:
    """An answer whose tokens are so much more likely now, with advantages 1, 2, 3 ..."""
    behaviour = np.full(len(log_ratios), -3.0, dtype=np.float32)
    tokens = {"behaviour": behaviour, "proximal": behaviour + np.array(log_ratios, dtype=np.float32)}
    tokens["advantages"] = np.arange(1, len(log_ratios) + 1, dtype=np.float32)
    return Response(np.arange(len(log_ratios)), {}, tokens)


@pytest.mark.parametrize(
    ("section", "first", "second", "facts"),
    [
        # Ratios of the tokens: 4, 1/2, 1/4 and 1, 8.
        ({"high": 2.0}, [2, 1, 0.75], [1, 4], (5.75 / 5, 2 / 5, 5.75**2 / (5 * 9.3125))),
        ({"high": 2.0, "low": 0.4}, [2, 1, 1.2], [1, 4], (5.9 / 5, 3 / 5, 5.9**2 / (5 * 9.41))),
        ({"treatment": "mask", "high": 5, "low": 0.4}, [4, 1, 0], [1, 0], (5.5 / 5, 2 / 5, 5.5**2 / (5 * 17.25))),
        # Of the answers: 1/2 and 8; their geometric means 2^(-1/3) and 8^(1/2).
        ({"level": "sequence", "high": 2.0}, [0.5, 1, 1.5], [2, 4], (1.25, 1 / 2, 2.5**2 / (2 * 4.25))),
        ({"level": "sequence", "treatment": "mask", "high": 2.0}, [0.5, 1, 1.5], [0, 0], (0.25, 1 / 2, 1 / 2)),
        ({"level": "sequence", "treatment": "mask", "high": 1.5, "low": 0.9}, [0, 0, 0], [0, 0], (0, 1, 0)),
        (
            {"level": "geometric", "high": 2.0},
            [2 ** (-1 / 3) * number for number in (1, 2, 3)],
            [2, 4],
            (1 + 2 ** (-4 / 3), 1 / 2, (2 + 2 ** (-1 / 3)) ** 2 / (2 * (4 + 2 ** (-2 / 3)))),
        ),
    ],
)
def test_weights_by_hand(
    section: dict[str, Any], first: list[float], second: list[float], facts: tuple[float, float, float]
) -> None:
    one, two = response(2 * LOG2, -LOG2, -2 * LOG2), response(0.0, 3 * LOG2)
    found = correct([one, two], CorrectionSection(**section))
    assert one.tokens["advantages"] == pytest.approx(first, rel=1e-6)
    assert two.tokens["advantages"] == pytest.approx(second, rel=1e-6)
    assert one.tokens["advantages"].dtype == np.float32
    treated = "masked" if section.get("treatment") == "mask" else "truncated"
    assert list(found) == ["correction_weight", f"correction_{treated}", "correction_effective"]
    assert tuple(found.values()) == pytest.approx(facts, rel=1e-6)


def test_a_long_answer_that_is_far_away_overflows_nothing() -> None:
    section = CorrectionSection(level="sequence", treatment="mask", high=1e9)
    far, near = response(*[50.0] * 100), response(*[-50.0] * 100)
    found = correct([far, near], section)
    assert far.tokens["advantages"][0] == pytest.approx(math.exp(20.0))
    assert near.tokens["advantages"][0] == pytest.approx(math.exp(-20.0))
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("edge", ["random 0", "one token", "alone"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("treatment", ["truncate", "mask"])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_weighted_advantages_are_trls_weighted_loss(name: str, treatment: str, level: str, edge: str) -> None:
    """TRL multiplies each token's loss, and its term for the divergence is added afterwards."""
    from trl import GRPOTrainer

    data = Data(edge)
    data.advantages = data.advantages[data.lengths.cumsum(0) - 1].repeat_interleave(data.lengths)
    plain = data.advantages[data.lengths.cumsum(0) - 1]
    section = CorrectionSection(level=level, treatment=treatment, high=1.1, low=0.8)  # type: ignore[arg-type]
    weights = [weights_of(ratios_of(row, level), section) for row in data.rows(data.proximal - data.behaviour)]
    spread = [np.broadcast_to(one, int(length)) for one, length in zip(weights, data.lengths, strict=True)]
    data.advantages = data.advantages * torch.from_numpy(np.concatenate(spread))
    settings = {"beta": 0.3} if name == "grpo" else {"max_tokens": 9}
    metrics, gradients = data.ours(name, **settings)

    leaf = data.logprobs.clone().requires_grad_()
    trainer = trl_stub(
        data,
        leaf,
        data.entropy,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=name,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        beta=settings.get("beta", 0.0),
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=9,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=None,
    )
    trainer.accelerator.sync_gradients = True
    difference = data.padded(data.proximal) - data.padded(data.behaviour)
    ratio = (difference.sum(1, keepdim=True) if level == "sequence" else difference).exp()
    kept = (ratio >= 0.8) & (ratio <= 1.1)
    ratio = ratio.clamp(0.8, 1.1) if treatment == "truncate" else ratio.masked_fill(~kept, 0.0)
    inputs = trl_inputs(data) | {
        "advantages": plain,
        "num_items_in_batch": torch.tensor(float(len(data.proximal))),
        "old_per_token_logps": data.padded(data.proximal),
        "ref_per_token_logps": data.padded(data.reference),
        "importance_sampling_ratio": ratio,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    same(metrics["loss"].detach(), loss.detach())
    same(gradients["logprobs"], leaf.grad)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "cispo", "reinforce_pp", "remax", "rloo"])
def test_a_weight_of_the_advantages_is_one_of_the_policy_loss(name: str) -> None:
    """For answers with one weight each, which every algorithm that takes a correction allows."""
    data = Data("random 1")
    if name == "rloo":
        data.advantages = data.advantages[data.lengths.cumsum(0) - 1].repeat_interleave(data.lengths)
    settings = {"beta": 0.0} if name == "grpo" else {}
    half = {key: 0.5 * value for key, value in data.ours(name, **settings)[1].items() if key == "logprobs"}
    data.advantages = 0.5 * data.advantages
    same(data.ours(name, **settings)[1]["logprobs"], half["logprobs"])


def test_a_training_is_corrected_and_says_how_much(models: dict[str, Path], tmp_path: Path) -> None:
    """Every token is e^-0.2 times as likely now as when it was sampled."""
    stale = make_experience(tmp_path / "stale", models["gqa"], shift=0.2, policy="an earlier one")
    settings = settings_for(models, stale, tmp_path / "out", algorithm="dr_grpo", optimizer="sgd", learning_rate=0.1)
    plain = run_here("policy", **settings)
    assert "metrics" not in plain.manifest.facts
    assert "correction" not in plain.manifest.key_parts["config"], "keys are as they were before there was one"
    found = run_here("policy", **settings | {"output": tmp_path / "all"}, correction={"high": 2.0}).manifest
    weight = math.exp(-0.2)
    expected = {"correction_weight": weight, "correction_truncated": 0.0, "correction_effective": 1.0}
    assert found.facts["metrics"] == pytest.approx(expected, abs=1e-5)
    assert found.facts["drift"]["mean"] == pytest.approx(0.2, abs=1e-5)
    assert found.key_parts["config"]["correction"] == {
        "level": "token", "treatment": "truncate", "high": 2.0, "low": 0.0
    }  # fmt: skip
    # The first step of SGD is the gradient, so it is smaller by that factor.
    logs = [training_log(tmp_path / name) for name in ("out", "all")]
    assert logs[1][0]["grad_norm"] == pytest.approx(weight * logs[0][0]["grad_norm"], rel=1e-4)

    masked = {"treatment": "mask", "low": 0.9}
    nothing = run_here("policy", **settings | {"output": tmp_path / "none"}, correction=masked)
    assert nothing.manifest.facts["metrics"]["correction_masked"] == 1.0
    assert training_log(nothing.path)[0]["grad_norm"] == 0
    before, after = (load_file(path / "model.safetensors") for path in (models["gqa"], nothing.path))
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_decoupled_ppo_on_answers_of_another_policy(models: dict[str, Path], tmp_path: Path) -> None:
    """Its trust region is around the policy that the training starts from; what sampled is in the weight alone.

    Each token is e^-0.2 times as likely under the first as under the second.
    """
    stale = make_experience(tmp_path / "stale", models["gqa"], shift=0.2, policy="an earlier one")
    settings = settings_for(models, stale, tmp_path / "out", algorithm="decoupled_ppo", epochs=1)
    artifact = run_here("policy", **settings)
    first = training_log(artifact.path)[0]
    assert first["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["behaviour_weight"] == pytest.approx(math.exp(-0.2), abs=1e-5)
    assert artifact.manifest.facts["drift"]["fresh"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "decoupled_ppo"}, "it learns from answers of older policies without one. Leave it out"),
        ({"algorithm": "raft"}, "its loss takes no advantages"),
        ({"algorithm": "rloo"}, "weights whole answers, not tokens. Set it to sequence or geometric"),
        ({"settings": {"importance_cap": 2.0}}, "importance_cap is 2.0 in addition to a correction"),
        ({"correction": {"high": 1.0}}, "greater than 1"),
        ({"correction": {"low": 1.0}}, "less than 1"),
        ({"correction": {"low": -0.1}}, "greater than or equal to 0"),
        ({"correction": {"level": "word"}}, "'token', 'sequence' or 'geometric'"),
    ],
)
def test_corrections_that_cannot_be(
    changes: dict[str, Any], message: str, models: dict[str, Path], experience: Path, tmp_path: Path
) -> None:
    settings = {"correction": {}} | settings_for(models, experience, tmp_path / "out") | changes
    with pytest.raises(UserError, match=message):
        run_here("policy", **settings)
