"""An adapter of PEFT's, merged: the published model computes what PEFT computes with the two."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, run_here
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from contracts.errors import UserError
from contracts.fingerprint import weights_fingerprint
from modeling.loading import load_causal

IDS = torch.arange(3, 13).view(1, 10)


def write_adapter(model: Path, folder: Path, *, words: int | None = None, **settings: Any) -> Path:
    """An adapter with random weights, as PEFT saves it after a training."""
    is_classifier = settings.get("task_type") == "SEQ_CLS"
    kind = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    base = kind.from_pretrained(model, **({"num_labels": 1} if is_classifier else {}))
    if words is not None:
        base.resize_token_embeddings(words)
    adapted = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers keep their weights transposed (Conv1D), with the tokenizer of another."""
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    words = AutoModelForCausalLM.from_pretrained(models["tied"]).config.vocab_size
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=words, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    for file in models["tied"].glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("tied", {"target_modules": "all-linear"}),
        ("gqa", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        ("gqa", {"target_modules": ["v_proj"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("tied", {"target_modules": ["embed_tokens", "o_proj"]}),
        ("gqa", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("gqa", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_the_merged_model_is_the_adapted_one(
    models: dict[str, Path], gpt2: Path, tmp_path: Path, base: str, settings: dict[str, Any]
) -> None:
    model = {**models, "gpt2": gpt2}[base]
    adapter = write_adapter(model, tmp_path / "adapter", **settings)
    artifact = run_here("merge", model=model, adapter=adapter, output=tmp_path / "merged")
    is_classifier = settings.get("task_type") == "SEQ_CLS"
    kind = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    labels = {"num_labels": 1} if is_classifier else {}
    start = kind.from_pretrained(model, **labels, tie_word_embeddings="embed" not in str(settings) and base != "gqa")
    if not start.config.tie_word_embeddings and not is_classifier and base == "tied":
        start.lm_head.weight = torch.nn.Parameter(start.get_input_embeddings().weight.detach().clone())
    adapted = PeftModel.from_pretrained(start, adapter).eval()
    merged, report = kind.from_pretrained(artifact.path, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        ids = IDS
        wanted, found = (network(ids).logits for network in (adapted, merged.eval()))
        before = kind.from_pretrained(model, **labels).eval()(ids).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    assert (found - before).abs().max() > 1e-2
    assert artifact.manifest.weights == weights_fingerprint(artifact.path)


def damage(adapter: Path, name: str) -> None:
    """Spoil an adapter in one of several ways."""
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    if name == "pickled":
        weights.rename(adapter / "adapter_model.bin")
    elif name == "cut":
        weights.write_bytes(weights.read_bytes()[:200])
    elif name == "nan":
        save_file({**tensors, first: torch.full_like(tensors[first], float("nan"))}, weights)
    elif name == "less":
        save_file({key: tensor for key, tensor in tensors.items() if key != first}, weights)
    elif name == "more":
        save_file({**tensors, first.replace("q_proj", "r_proj"): tensors[first].clone()}, weights)
    elif name == "soft":
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    else:
        (adapter / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("pickled", "has no adapter_model.safetensors; other formats can run code"),
        ("cut", "adapter_model.safetensors is cut off or damaged"),
        ("nan", "has values that are not finite"),
        ("less", "does not belong to"),
        ("more", "does not belong to"),
        ("soft", "of type PROMPT_TUNING, which cannot be merged into weights"),
        ("none", "is not an adapter: it has no adapter_config.json"),
    ],
)
def test_an_adapter_that_cannot_be_merged(models: dict[str, Path], tmp_path: Path, name: str, complaint: str) -> None:
    adapter = write_adapter(models["tied"], tmp_path / "adapter", target_modules=["q_proj"])
    damage(adapter, name)
    with pytest.raises(UserError, match=complaint):
        run_here("merge", model=models["tied"], adapter=adapter, output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(
        make_model(tmp_path / "wide", hidden_size=96), tmp_path / "adapter", target_modules=["q_proj"]
    )
    with pytest.raises(UserError, match=r"cannot be put on .*Give the model that it was trained on"):
        run_here("merge", model=models["tied"], adapter=adapter, output=tmp_path / "merged")


def test_a_model_in_bfloat16_keeps_the_adapter_in_full(models: dict[str, Path], tmp_path: Path) -> None:
    """What rounding leaves out is handed on to a training, as from every other stage."""
    model = tmp_path / "bf16"
    shutil.copytree(models["gqa"], model)
    AutoModelForCausalLM.from_pretrained(models["gqa"], dtype=torch.bfloat16).save_pretrained(model)
    adapter = write_adapter(model, tmp_path / "adapter", target_modules="all-linear")
    artifact = run_here("merge", model=model, adapter=adapter, output=tmp_path / "merged")
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(start, adapter).eval()
    whole = load_causal(artifact.path, torch.float32, master=True).eval()
    assert AutoModelForCausalLM.from_pretrained(artifact.path).dtype is torch.bfloat16
    with torch.no_grad():
        assert torch.allclose(whole(IDS).logits, adapted(IDS).logits, atol=1e-4)


def test_words_that_were_added_with_the_adapter_are_kept(models: dict[str, Path], tmp_path: Path) -> None:
    words = AutoModelForCausalLM.from_pretrained(models["gqa"]).config.vocab_size + 8
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    adapter = write_adapter(models["gqa"], tmp_path / "adapter", words=words, **settings)
    artifact = run_here("merge", model=models["gqa"], adapter=adapter, output=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == words
