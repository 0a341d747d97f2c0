"""What is published: whole, validated, readable by others, the same bytes every time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import dpo_settings, run_here, training_log
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from contracts.fingerprint import weights_fingerprint
from contracts.publication import Publication
from contracts.records import CHECKPOINT
from modeling.loading import tensor_shapes
from training.checkpoint import save_checkpoint


@pytest.mark.parametrize("which", ["tied", "gqa"])
def test_checkpoint_is_complete(which: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    artifact = run_here("policy", **dpo_settings(models, pairs, tmp_path / "out", model=models[which]))
    start, out = models[which], artifact.path
    assert artifact.damage() == []
    assert artifact.manifest.weights == weights_fingerprint(out)
    assert str(artifact.manifest.ledger) == "22 pairs in = 22 kept"
    stored = load_file(out / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert ("lm_head.weight" in stored) == (which != "tied")  # tied weights are stored once
    whole = {"lm_head.weight": stored["model.embed_tokens.weight"], **stored}
    assert loaded.state_dict().keys() == whole.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole[name]), name
    config = json.loads((out / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"], config["rope_theta"]) == ("float32", "float32", 5000.0)
    assert loaded.config.rope_parameters["rope_theta"] == 5000.0
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (start / name).read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(start).chat_template
    log = training_log(out)
    assert [line["step"] for line in log] == list(range(1, 13))
    assert log[-1]["accuracy"] > log[0]["accuracy"]
    assert artifact.manifest.facts["steps"] == 12


def test_same_run_same_bytes(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    first, second, other = (
        run_here("policy", **dpo_settings(models, pairs, tmp_path / name, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.manifest.files == second.manifest.files
    assert first.manifest.digest != other.manifest.digest


def test_bfloat16_and_frozen(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    settings = dpo_settings(models, pairs, tmp_path / "out", dtype="bfloat16", frozen=["embed_tokens"])
    out = run_here("policy", **settings).path
    stored, start = load_file(out / "model.safetensors"), load_file(models["tied"] / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["model.embed_tokens.weight"], start["model.embed_tokens.weight"].bfloat16())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(stored[name], start[name].bfloat16())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def save(target: Path, model: Any, start: Path, state: dict[str, torch.Tensor], **options: Any) -> Path:
    publication = Publication(target, CHECKPOINT, "test", "key")
    publication.begin()
    shapes = tensor_shapes(AutoModelForCausalLM, model.config)
    save_checkpoint(
        publication, state, model,
        start=start, shapes=shapes, dtype=torch.float32, changes={}, unit="pairs", **options,
    )  # fmt: skip
    return publication.directory


def test_shards(models: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["gqa"])
    written = save(tmp_path / "out", model, models["gqa"], model.state_dict(), shard_bytes=100_000)
    files = sorted(path.name for path in written.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded = AutoModelForCausalLM.from_pretrained(written)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize("damage", ["missing", "empty", "nan"])
def test_a_damaged_state_is_never_published(damage: str, models: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["tied"])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = "model.layers.1.mlp.down_proj.weight"
    if damage == "missing":
        del state[name]
    elif damage == "empty":
        state[name] = torch.zeros(0)
    else:
        state[name][0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=name):
        save(tmp_path / "out", model, models["tied"], state)
    assert not list((tmp_path / "out").parent.glob("**/model.safetensors"))
