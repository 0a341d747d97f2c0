"""Between trainings: engines read bfloat16, the next training begins with the fp32 that the last one ended with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import dpo_settings, make_model, run_cli, run_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fingerprint import weights_fingerprint
from contracts.models import MASTER
from contracts.preflight import PreflightRequest, StageRequest, examine
from modeling.loading import load_causal
from modeling.master import MasterWeights, has_remainder, join, split


def test_two_halves_are_the_whole() -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=torch.Generator().manual_seed(0)).int()
    ties = (torch.arange(1 << 12).int() << 18) | (1 << 15)
    zeros = torch.tensor([0, -(1 << 31), 1 << 15, (1 << 31) - (1 << 24)]).int()
    numbers = torch.cat([bits, ties, zeros]).view(torch.float32)
    numbers = numbers[numbers.abs() < 1e38]
    upper, rest = split(numbers)
    assert torch.equal(join(upper, rest).view(torch.int32), numbers.view(torch.int32))
    assert float(((upper.float() - numbers).abs() / numbers.abs().clamp(min=1e-37)).max()) <= 2**-8
    exact = numbers.bfloat16().float()
    assert torch.equal(split(exact)[0], exact.bfloat16())
    assert not has_remainder(split(exact)[1])
    scalar = torch.tensor(0.1)
    assert torch.equal(join(*split(scalar)), scalar)


def small_steps(models: dict[str, Path], pairs: dict[str, Path], output: Path, **changes: Any) -> dict[str, Any]:
    """Steps that are far below the last bit of most weights in bfloat16."""
    settings = {"learning_rate": 1e-5, "schedule": "constant", "dtype": "bfloat16", "weight_decay": 0.0}
    return dpo_settings(models, pairs, output, **settings, **changes)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, as they are downloaded."""
    path = make_model(tmp_path_factory.mktemp("start") / "model", tied=False)
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.slow
def test_a_second_training_goes_on_where_the_first_ended(
    start: Path, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    first = run_here("policy", **small_steps(models, pairs, tmp_path / "one", model=start))
    facts = first.manifest.facts
    assert facts["start_precision"] == "bfloat16"
    # Three quarters of the weights have moved without a trace in what engines read.
    assert facts["update_kept"]["weights"] < 0.5
    assert 0.2 < facts["update_kept"]["norm"] < 1.5
    assert {tensor.dtype for tensor in load_file(first.path / "model.safetensors").values()} == {torch.bfloat16}
    whole = dict(MasterWeights(first.path).items())
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(whole[norm], load_file(start / "model.safetensors")[norm].float())
    loaded = load_causal(first.path, torch.float32, master=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())
    # A step of size 0 hands on what it got, bit by bit.
    idle = small_steps(models, pairs, tmp_path / "two", model=first.path) | {"learning_rate": 1e-30}
    second = run_here("policy", **idle)
    assert second.manifest.facts["start_precision"] == "float32"
    again = dict(MasterWeights(second.path).items())
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    # Without the rests it is what engines see.
    bare = shutil.copytree(first.path, tmp_path / "bare", ignore=shutil.ignore_patterns(MASTER, "manifest.json"))
    assert weights_fingerprint(bare) == weights_fingerprint(first.path)
    third = run_here("policy", **idle | {"model": bare, "output": tmp_path / "three"})
    assert third.manifest.facts["start_precision"] == "bfloat16"


@pytest.mark.slow
def test_what_is_missing_to_fp32_belongs_to_its_weights(
    start: Path, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    one, two = (
        run_here("policy", **small_steps(models, pairs, tmp_path / str(seed), model=start, seed=seed)).path
        for seed in (0, 1)
    )
    mixed = shutil.copytree(one, tmp_path / "mixed", ignore=shutil.ignore_patterns("manifest.json"))
    MasterWeights(mixed)
    shutil.copy(two / MASTER / "model.safetensors", mixed / MASTER)
    settings = small_steps(models, pairs, tmp_path / "out", model=mixed)
    with pytest.raises(UserError, match="files of two checkpoints are mixed"):
        run_here("policy", **settings)
    asked = StageRequest("training", "training", "policy", json.loads(json.dumps(settings, default=str)), ())
    findings = examine(PreflightRequest((asked,))).findings
    (found,) = [each for each in findings if each.level == "error"]
    assert "files of two checkpoints are mixed" in found.found


def test_averages_and_new_critics_keep_the_precision(
    start: Path, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    one = run_here("policy", **small_steps(models, pairs, tmp_path / "one", model=start)).path
    average = run_here("ema", average=start, model=one, decay=0.5, output=tmp_path / "average").path
    critic = run_here("value-head", model=one, output=tmp_path / "critic").path
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = load_file(start / "model.safetensors")[name].float(), MasterWeights(one).read(name)
    torch.testing.assert_close(MasterWeights(average).read(name), before.lerp(after, 0.5), atol=0, rtol=1e-6)
    assert torch.equal(MasterWeights(critic).read(name), after)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"dp": 2, "zero": 3}, {"dp": 2, "zero": "fsdp2"}])
def test_under_every_engine(
    layout: dict[str, Any], start: Path, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    """A training without a step that counts hands on the fp32 that it began with."""
    one = run_here("policy", **small_steps(models, pairs, tmp_path / "one", model=start)).path
    settings = small_steps(models, pairs, tmp_path / "two", model=one) | {"learning_rate": 1e-30, "max_steps": 1}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({**settings, "parallel": layout}, default=str))
    run_cli("policy", "--config", path)
    two = Artifact.open(tmp_path / "two")
    assert two.manifest.facts["start_precision"] == "float32"
    for name, tensor in MasterWeights(one).items():
        assert torch.equal(MasterWeights(two.path).read(name), tensor), name
