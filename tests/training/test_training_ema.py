"""The moving average of policies: the formula, tensor by tensor, in a checkpoint like any other."""

from pathlib import Path

import pytest
from conftest import make_model, run_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from contracts.errors import UserError


def test_the_average_moves_by_its_decay(models: dict[str, Path], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=5)
    artifact = run_here("ema", average=models["tied"], model=other, decay=0.75, output=tmp_path / "mean")
    old, new, mean = (AutoModelForCausalLM.from_pretrained(path) for path in (models["tied"], other, artifact.path))
    for name, tensor in mean.state_dict().items():
        expected = 0.75 * old.state_dict()[name] + 0.25 * new.state_dict()[name]
        assert (tensor - expected).abs().max() < 1e-6
        assert (tensor - old.state_dict()[name]).abs().max() > 1e-4 or "norm" in name
    assert "lm_head.weight" not in load_file(artifact.path / "model.safetensors")  # tied weights are stored once


def test_models_of_different_shapes_have_no_average(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="different architectures"):
        run_here("ema", average=models["tied"], model=models["gqa"], output=tmp_path / "mean")
    assert list(tmp_path.iterdir()) == []
