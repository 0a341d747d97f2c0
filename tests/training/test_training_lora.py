"""Adapters: the weights that are published are those that were trained, and nothing else has changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import dpo_settings, make_model, make_pairs, run_cli, run_here, training_log
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from contracts.errors import UserError
from training.reward import held_out_prompts

LORA: dict[str, Any] = {"rank": 4, "alpha": 8}


@pytest.mark.slow
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


@pytest.mark.slow
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
        ({"lora": LORA, "parallel": {"tp": 2}}, "adapters are not sharded"),
    ],
)
def test_what_cannot_be_adapted(
    settings: dict[str, Any], message: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_here("policy", **dpo_settings(models, pairs, tmp_path / "out", **settings))


@pytest.mark.parametrize("targets", [["all-linear"], ["attn.c_proj"], ["wte", "c_fc"]])
def test_the_checkpoint_is_the_trained_model_whatever_layers_are_adapted(
    targets: list[str], pairs: dict[str, Path], tmp_path: Path
) -> None:
    """GPT-2's layers have weights [in, out], of which attn.c_proj is square; an embedding is read by rows."""
    model = make_model(tmp_path / "model", kind="gpt2", tied=False, head_dim=None)
    settings = {"model": model, "pairs": [pairs["pairs"]], "global_batch": 6, "epochs": 3, "learning_rate": 1e-1}
    lora = {"rank": 4, "alpha": 64, "targets": targets}
    made = run_here("reward", **settings, lora=lora, output=tmp_path / "out", eval_fraction=0.3)
    assert made.manifest.facts["read_back"]["differences"]["scores"] < 1e-4
    scored = AutoModelForSequenceClassification.from_pretrained(made.path).eval()
    scored.config.pad_token_id = -1
    rows = make_pairs(22)
    held_out = held_out_prompts({pair.prompt_id for pair in rows}, 0.3, 0)
    margins = [
        float(scored(torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])).logits[0, 0])
        - float(scored(torch.tensor([[*pair.prompt_ids, *pair.rejected_ids]])).logits[0, 0])
        for pair in rows
        if pair.prompt_id in held_out
    ]
    assert sum(margins) / len(margins) == pytest.approx(training_log(made.path)[-1]["held_out_margin"], abs=1e-4)


def test_a_checkpoint_that_is_another_model_is_not_published(
    models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmerged(weights: dict[str, torch.Tensor], *_: Any) -> dict[str, torch.Tensor]:
        return {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items() if ".lora_" not in name}

    monkeypatch.setattr("training.fit.merge_adapters", unmerged)
    settings = dpo_settings(models, pairs, tmp_path / "out", learning_rate=1e-1)
    with pytest.raises(RuntimeError, match="read back, computes other logprobs than the trained model"):
        run_here("policy", **settings, lora=LORA)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("which", "target"), [("gqa", "lm_head"), ("tied", "embed_tokens")])
def test_adapters_that_would_not_count_are_refused(
    which: str, target: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    settings = dpo_settings(models, pairs, tmp_path / "out", model=models[which])
    with pytest.raises(UserError, match=r"includes the (LM head|embedding)"):
        run_here("policy", **settings, lora={**LORA, "targets": [target]})
