"""The same global batch gives the same loss and gradient however it is divided into micro-batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_training, five_steps, run_here
from transformers import OPTConfig, OPTForCausalLM

from modeling.modes import set_modes


@pytest.fixture(scope="module")
def whole(
    models: dict[str, Path], pairs: dict[str, Path], demonstrations: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A training with one micro-batch per step."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_here("policy", **five_steps("policy", models["tied"], pairs, demonstrations), output=output)
    return output


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_tokens": 48},
        {"micro_batch_tokens": 48, "packing": "flat"},
        {"micro_batch_tokens": 48, "packing": "padded"},
        {"gradient_checkpointing": True},
    ],
    ids=["small-micro-batches", "flat", "padded", "recomputed"],
)
def test_micro_batches_change_nothing(
    changes: dict[str, Any],
    whole: Path,
    models: dict[str, Path],
    pairs: dict[str, Path],
    demonstrations: Path,
    tmp_path: Path,
) -> None:
    settings = five_steps("policy", models["tied"], pairs, demonstrations) | changes
    run_here("policy", **settings, output=tmp_path / "out")
    assert_same_training(whole, tmp_path / "out")


def test_recomputation_switches_no_dropout_on() -> None:
    """OPT's layers have a dropout that follows their own mode, which recomputation needs to be that of training."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=32, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, dropout=0.5, attention_dropout=0.5,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    ids = torch.arange(12)[None]
    gradients = []
    for recomputed in (False, True):
        set_modes(model, recomputed)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: value.grad.clone() for name, value in model.named_parameters()})
    assert all(layer.training for layer in model.model.decoder.layers), "otherwise nothing is recomputed"
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name
