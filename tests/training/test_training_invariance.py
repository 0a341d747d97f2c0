"""The same global batch gives the same loss and gradient under every parallel layout, through the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_cli, training_log
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

from contracts.artifacts import Artifact
from training.models import set_modes

ZERO2, ZERO3 = (ROOT / "configs" / "accelerate" / f"zero{stage}.yaml" for stage in (2, 3))
LAYOUTS: dict[str, tuple[list[str], tuple[int, int]]] = {
    "small-micro-batches": (["micro_batch_tokens=48"], (1, 0)),
    "padded": (["packing=padded", "micro_batch_tokens=48"], (1, 0)),
    "recomputed": (["gradient_checkpointing=true"], (1, 0)),
    "ddp": (["processes=2", "micro_batch_tokens=48"], (2, 0)),
    "zero2": (["processes=2", "micro_batch_tokens=48", f"accelerate_config={ZERO2}"], (2, 2)),
    "zero3": (["processes=2", "micro_batch_tokens=48", f"accelerate_config={ZERO3}"], (2, 3)),
}


def command(stage: str, models: dict[str, Path], pairs: dict[str, Path], demonstrations: Path) -> list[str]:
    """Five steps of SGD; the last batch of the epoch is incomplete (22 = 3 x 6 + 4, 20 = 3 x 6 + 2)."""
    shared = "global_batch=6 epochs=2 max_steps=5 optimizer=sgd learning_rate=0.05 schedule=constant".split()
    data = {
        "dpo": [f"pairs=[{pairs['pairs']}]", f"reference=[{pairs['reference']}]", "nll_coefficient=0.3"],
        "reward": [f"pairs=[{pairs['pairs']}]", "eval_fraction=0.2"],
        "sft": [f"demonstrations={demonstrations}"],
    }[stage]
    return [
        "policy" if stage == "dpo" else stage,
        f"model={models['gqa' if stage == 'sft' else 'tied']}",
        *data,
        *shared,
    ]


@pytest.fixture(scope="module")
def one_process(
    models: dict[str, Path], pairs: dict[str, Path], demonstrations: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Each stage in one process with one micro-batch per step."""
    folder = tmp_path_factory.mktemp("one")
    for stage in ("dpo", "reward", "sft"):
        run_cli(*command(stage, models, pairs, demonstrations), f"output={folder / stage}")
    return {stage: folder / stage for stage in ("dpo", "reward", "sft")}


@pytest.mark.parametrize(
    ("stage", "layout"),
    [*(("dpo", layout) for layout in LAYOUTS), ("sft", "zero3"), ("reward", "zero3")],
)
def test_layout_changes_nothing(
    stage: str,
    layout: str,
    one_process: dict[str, Path],
    models: dict[str, Path],
    pairs: dict[str, Path],
    demonstrations: Path,
    tmp_path: Path,
) -> None:
    options, (processes, zero) = LAYOUTS[layout]
    output = tmp_path / "out"
    run_cli(*command(stage, models, pairs, demonstrations), *options, f"output={output}")
    facts = Artifact.open(output).manifest.facts
    # accelerate falls back to plain data parallelism without a word, and then the losses below agree all the same.
    assert (facts["processes"], facts["zero_stage"]) == (processes, zero)
    expected, found = training_log(one_process[stage]), training_log(output)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert len(found) == 5
    for line, other in zip(expected, found, strict=True):
        assert other == pytest.approx(line, abs=1e-4)
    before, after = weights(one_process[stage]), weights(output)
    start = weights(models["gqa" if stage == "sft" else "tied"])
    moved = max(float((before[name] - start[name]).abs().max()) for name in before.keys() & start.keys())
    assert moved > 1e-3
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def weights(directory: Path) -> dict[str, Any]:
    return dict(load_file(directory / "model.safetensors"))


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


def test_a_declared_zero_stage_that_does_not_run_is_an_error(
    models: dict[str, Path], pairs: dict[str, Path], demonstrations: Path, tmp_path: Path
) -> None:
    """A rank started without DeepSpeed's environment must not train as if nothing were amiss."""
    arguments = command("dpo", models, pairs, demonstrations)
    result = run_cli(
        *arguments, f"output={tmp_path / 'out'}", f"accelerate_config={ZERO2}",
        check=False, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    assert result.returncode == 2
    assert "declares ZeRO stage 2, but 0 is running" in result.stderr
    assert not (tmp_path / "out").exists()


def test_another_number_of_processes_is_an_error(
    models: dict[str, Path], pairs: dict[str, Path], demonstrations: Path, tmp_path: Path
) -> None:
    arguments = command("dpo", models, pairs, demonstrations)
    result = run_cli(
        *arguments, f"output={tmp_path / 'out'}", "processes=2",
        check=False, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    assert result.returncode == 2
    assert "1 process(es) were started, but processes=2" in result.stderr
