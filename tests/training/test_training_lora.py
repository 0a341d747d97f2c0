"""Adapters: the weights that are published are those that were trained, and nothing else has changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import dpo_settings, run_cli, run_here, training_log
from safetensors.torch import load_file

from contracts.errors import UserError

LORA: dict[str, Any] = {"rank": 4, "alpha": 8}


@pytest.mark.parametrize("which", ["tied", "gqa"])
def test_merged_adapters_go_on_where_training_ended(
    which: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    """The loss of the next training's first step on the merged model is that of the last policy on the same batch."""
    shared = {"model": models[which], "global_batch": 22, "epochs": 1, "schedule": "constant", "warmup_ratio": 0.0}
    settings = {**dpo_settings(models, pairs, tmp_path / "one"), **shared, "learning_rate": 1e-2, "optimizer": "sgd"}
    one = run_here("policy", **settings, lora=LORA)
    plain = run_here("policy", **settings | {"output": tmp_path / "plain"})
    # Adapters begin as nothing.
    assert training_log(one.path)[0]["loss"] == pytest.approx(training_log(plain.path)[0]["loss"], abs=1e-6)
    two = run_here("policy", **settings | {"output": tmp_path / "two", "epochs": 2}, lora=LORA)
    after = run_here("policy", **settings | {"output": tmp_path / "after", "model": one.path})
    assert training_log(after.path)[0]["loss"] == pytest.approx(training_log(two.path)[1]["loss"], abs=1e-5)
    assert training_log(two.path)[1]["loss"] < training_log(two.path)[0]["loss"] - 1e-4
    start, merged = load_file(models[which] / "model.safetensors"), load_file(one.path / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    assert changed == {name for name in start if "proj" in name}
    assert one.manifest.facts["trained_parameters"] < plain.manifest.facts["trained_parameters"] / 2


def test_a_classifier_trains_its_head_too(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    settings = {"model": models["tied"], "pairs": [pairs["pairs"]], "global_batch": 6, "learning_rate": 1e-2}
    first, last = (
        run_here("reward", **settings, lora=LORA, max_steps=steps, output=tmp_path / str(steps)) for steps in (1, 3)
    )
    heads = [load_file(artifact.path / "model.safetensors")["score.weight"] for artifact in (first, last)]
    assert not torch.equal(*heads)


def test_adapters_under_zero(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    """ZeRO-3 spreads base weights and adapters alike."""
    arguments = [
        "policy", f"model={models['gqa']}", f"pairs=[{pairs['pairs']}]", f"reference=[{pairs['reference']}]",
        "global_batch=6", "max_steps=3", "optimizer=sgd", "learning_rate=0.5", "schedule=constant",
        f"lora={json.dumps(LORA)}",
    ]  # fmt: skip
    run_cli(*arguments, f"output={tmp_path / 'one'}")
    run_cli(*arguments, f"output={tmp_path / 'zero'}", "parallel.dp=2", "parallel.zero=3")
    for line, other in zip(training_log(tmp_path / "one"), training_log(tmp_path / "zero"), strict=True):
        assert other == pytest.approx(line, abs=1e-4)
    one, zero = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "zero"))
    start = load_file(models["gqa"] / "model.safetensors")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(zero[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"targets": ["q_prj"]}}, r"lora.targets=\['q_prj'\] cannot be adapted"),
        ({"lora": LORA, "frozen": ["embed_tokens"]}, "only adapters are trained"),
        ({"lora": LORA, "parallel": {"tp": 2}}, "adapters are not divided"),
    ],
)
def test_what_cannot_be_adapted(
    settings: dict[str, Any], message: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_here("policy", **dpo_settings(models, pairs, tmp_path / "out", **settings))
