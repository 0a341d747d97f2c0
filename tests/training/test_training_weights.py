"""Weights that are not those of the model which config.json describes: found by reading, refused by every stage."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import dpo_settings, make_model, run_here
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from contracts.errors import UserError
from contracts.fingerprint import weights_fingerprint
from contracts.preflight import PreflightRequest, StageRequest, examine
from modeling.loading import check_weights, load_causal, load_classifier, load_reward

PROJECTION = "model.layers.1.mlp.down_proj.weight"
Change = Callable[[Path], Any]


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Change the tensors of model.safetensors in place."""

    def apply(model: Path) -> None:
        found = load_file(model / "model.safetensors")
        change(found)
        save_file(found, model / "model.safetensors", {"format": "pt"})

    return apply


def config(**changes: Any) -> Change:
    def apply(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def shards(change: Change) -> Change:
    """Save the model in several files, and change those."""

    def apply(model: Path) -> None:
        loaded = AutoModelForCausalLM.from_pretrained(model)
        (model / "model.safetensors").unlink()
        loaded.save_pretrained(model, max_shard_size="100KB")
        change(model)

    return apply


def second_shard(model: Path) -> Path:
    return sorted(model.glob("model-*.safetensors"))[1]


def twice(model: Path) -> None:
    files = sorted(model.glob("model-*.safetensors"))
    save_file({**load_file(files[1]), **load_file(files[0])}, files[1], {"format": "pt"})


def elsewhere(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][PROJECTION] = sorted(model.glob("model-*.safetensors"))[0].name
    path.write_text(json.dumps(index))


def broken(value: float) -> Change:
    return tensors(lambda found: found[PROJECTION].view(-1)[-1:].fill_(value))


DAMAGES: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (tensors(lambda found: found.pop(PROJECTION)), f"lacks {PROJECTION}, which LlamaFor"),
    "one too many": (
        tensors(lambda found: found.update({"model.layers.2.mlp.down_proj.weight": found[PROJECTION].clone()})),
        "holds model.layers.2.mlp.down_proj.weight, which LlamaFor.* does not have, so the loaded model would differ",
    ),
    "another shape": (config(intermediate_size=96), r"is \[64, 128\], LlamaFor.* needs \[64, 96\]"),
    "fewer layers": (config(num_hidden_layers=1), "which LlamaFor.* does not have, so the loaded model would differ"),
    "NaN": (broken(float("nan")), f"holds weights that are NaN or infinite: {PROJECTION}"),
    "infinity": (broken(float("-inf")), f"holds weights that are NaN or infinite: {PROJECTION}"),
    "a shard is missing": (shards(lambda model: second_shard(model).unlink()), "lacks 1 of its . weight files: model-"),
    "a shard is cut off": (
        shards(lambda model: second_shard(model).write_bytes(second_shard(model).read_bytes()[:-9])),
        "cut off or damaged",
    ),
    "no index": (shards(lambda model: (model / "model.safetensors.index.json").unlink()), "has neither"),
    "a broken index": (
        shards(lambda model: (model / "model.safetensors.index.json").write_text("[]")), "is not an index",
    ),
    "in two files": (shards(twice), "holds .* twice"),
    "in another file": (shards(elsewhere), f"says that {PROJECTION} is in .*, which does not hold it"),
    "quantised": (config(quantization_config={"quant_method": "awq"}), "is a quantised checkpoint .*awq"),
    "an adapter": (
        lambda model: (model / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}'),
        "holds an adapter .PEFT. of some/base.*python -m training merge model=some/base adapter=",
    ),
    "code of its own": (
        config(model_type="own", auto_map={"AutoConfig": "own.Own"}), "needs its own Python code",
    ),
    "an unknown architecture": (config(model_type="never_heard_of"), "cannot read the configuration"),
    "a size that is no number": (config(hidden_size="64"), "configuration of .*'hidden_size' expected int"),
    "no heads": (config(num_attention_heads=0), "cannot (read|make) the "),
    "a context that is no number": (
        config(max_position_embeddings="512"), "max_position_embeddings in .* is '512', which is not a whole number",
    ),
    "no class": (config(architectures=None), "does not say which class its weights are of: .* is None"),
    "a pointer of Git LFS": (
        lambda model: (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 0\n"),
        "is a pointer of Git LFS, not the weights .*git lfs pull",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_found_by_reading_and_by_every_load(damage: str, models: dict[str, Path], tmp_path: Path) -> None:
    change, words = DAMAGES[damage]
    model = shutil.copytree(models["gqa"], tmp_path / "model")
    change(model)
    for load in (
        lambda: check_weights(model, "causal"),
        lambda: check_weights(model, "classifier"),
        lambda: load_causal(model, torch.float32),
        lambda: load_reward(model, torch.float32, seed=0),
    ):
        with pytest.raises(UserError, match=words):
            load()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_whole_models_pass(kind: str, tied: bool, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind=kind, tied=tied)
    old = tensors(lambda found: found.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    old(model)
    check_weights(model, "causal")
    check_weights(model, "classifier")
    load_causal(model, torch.float32)
    reward = load_reward(model, torch.float32, seed=0)
    reward.save_pretrained(tmp_path / "reward")
    check_weights(tmp_path / "reward", "classifier")
    load_classifier(tmp_path / "reward", torch.float32)
    tensors(lambda found: found.pop("score.weight"))(tmp_path / "reward")
    for load in (
        lambda: check_weights(tmp_path / "reward", "classifier"),
        lambda: load_classifier(tmp_path / "reward", torch.float32),
    ):
        with pytest.raises(UserError, match=r"lacks score\.weight"):
            load()


def test_a_tied_head_that_is_another_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """vLLM would sample with the embedding as its head, transformers train the head that the file holds."""
    model = shutil.copytree(models["gqa"], tmp_path / "model")
    check_weights(model, "causal")
    config(tie_word_embeddings=True)(model)
    with pytest.raises(UserError, match=r"holds model.embed_tokens.weight and lm_head.weight, which are tied"):
        check_weights(model, "causal")
    tensors(lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"].clone()}))(model)
    check_weights(model, "causal")


def test_an_encoder_decoder_is_no_policy(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, num_decoder_layers=1)
    T5ForConditionalGeneration(small).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="is an encoder-decoder"):
        check_weights(tmp_path / "t5", "causal")


@pytest.mark.parametrize("stage", ["policy", "ema", "value-head"])
def test_stages_refuse_and_leave_nothing(
    stage: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(models["tied"], tmp_path / "model")
    broken(float("nan"))(model)
    settings = {
        "policy": dpo_settings(models, pairs, tmp_path / "out", model=model),
        "ema": {"average": models["tied"], "model": model, "output": tmp_path / "out"},
        "value-head": {"model": model, "output": tmp_path / "out"},
    }[stage]
    with pytest.raises(UserError, match=f"NaN or infinite: {PROJECTION}"):
        run_here(stage, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "it holds the weights of its architecture, all of them finite"),
        ({"model": "broken"}, f"NaN or infinite: {PROJECTION}"),
        ({"lora": {"targets": ["nothing"]}}, "cannot be adapted"),
        ({"lora": {"targets": ["embed_tokens"]}}, "includes the embedding, which is also the LM head"),
        ({"frozen": ["nothing"]}, "no parameter's name contains 'nothing'"),
    ],
)
def test_preflight_says_the_same(
    changes: dict[str, Any], words: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(models["tied"], tmp_path / "model")
    if changes.get("model"):
        broken(float("nan"))(model)
    settings = dpo_settings(models, pairs, tmp_path / "out", **{**changes, "model": model})
    asked = StageRequest("training", "training", "policy", json.loads(json.dumps(settings, default=str)), ())
    found = examine(PreflightRequest((asked,))).findings
    assert re.search(words, "\n".join(finding.found for finding in found))


def test_files_beside_the_weights_are_no_adapter(models: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(models["tied"], tmp_path / "model")
    (model / "preprocessor_config.json").write_text("{}")
    assert weights_fingerprint(model) == weights_fingerprint(models["tied"])
    AutoModelForSequenceClassification.from_pretrained(model)
