"""Parameters between layouts: live between processes, and from files, where a process reads only its own slices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, dpo_settings, make_model, run_here

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 90,
}  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of eight processes says."""
    folder = tmp_path_factory.mktemp("live")
    models = [
        make_model(folder / "llama", tied=False, **SHAPE),
        make_model(folder / "qwen2", kind="qwen2", **SHAPE, dtype="bfloat16"),
        make_model(folder / "gemma2", kind="gemma2", **SHAPE),
        make_model(folder / "gemma3", kind="gemma3_text", **SHAPE, dtype="bfloat16"),
        make_model(folder / "qwen3", kind="qwen3", **SHAPE),
    ]
    script = Path(__file__).with_name("reallocation_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed is given back
    command = [sys.executable, str(script), str(folder), *map(str, models)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_bytes()) for rank in range(8)]


def test_all_pairs_of_layouts_are_bitwise_equal_and_move_what_the_plan_says(together: list[dict[str, Any]]) -> None:
    assert [report["wrong"] for report in together] == [[]] * 8


def test_memory_stays_below_the_share_and_one_bucket(together: list[dict[str, Any]]) -> None:
    """Beyond that only what the kernel and the allocator need for any process: pages of its code, counters."""
    for report in together:
        memory = report["memory"]
        assert memory["share"] == 16 << 20
        assert memory["bucket"] / 2 < memory["staged"] <= memory["bucket"]
        assert memory["grown"] < memory["share"] + memory["bucket"] + (1 << 20)


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", False), ("smollm3", True), ("gemma", True),
        ("gemma2", True), ("gemma3_text", True),
    ],
)  # fmt: skip
def test_what_transformers_writes_is_divided_by_its_architecture(kind: str, tied: bool, tmp_path: Path) -> None:
    """Its names, shapes and config.json; there and back bit for bit, and a rank has its heads and its layers."""
    from contracts.weights import read_header
    from reallocation.layouts import RankLayout
    from reallocation.resharding import reshard
    from reallocation.stored import StoredModel

    model = make_model(tmp_path / "model", kind=kind, tied=tied, **SHAPE, dtype="bfloat16")
    for number, text in enumerate(("tp=4,pp=2", "dp=2,tp=2,pp=3,shard=rows", "tp=8,vocab=whole", "dp=3,shard=flat")):
        divided, back = tmp_path / f"divided-{number}", tmp_path / f"back-{number}"
        reshard(StoredModel(model), RankLayout.parse(text), divided)
        reshard(StoredModel(divided), RankLayout(), back)
        assert (back / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    held = read_header(tmp_path / "divided-0/model-rank-6-part-0.safetensors")  # the last stage's third part
    layers = {name.split(".")[2]: tensor for name, tensor in held.items() if name.endswith("down_proj.weight")}
    assert {number: tensor.shape for number, tensor in layers.items()} == {"2": (32, 16)}
    assert held["model.layers.2.self_attn.q_proj.weight"].shape == (8, 32)
    assert held["model.layers.2.self_attn.k_proj.weight"].shape == (4, 32)  # one of two heads, in two ranks each
    if kind in ("qwen3", "gemma3_text"):
        assert held["model.layers.2.self_attn.q_norm.weight"].shape == (4,)
    words = held["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert words.shape == (90 - 2 * 32, 32)  # of 90 filled up to 128, the third quarter


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_that_peft_writes(dora: bool, tmp_path: Path) -> None:
    """There and back bit for bit; what the adapter of a rank changes is its part of what the whole one changes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from reallocation.layouts import RankLayout
    from reallocation.resharding import reshard
    from reallocation.stored import StoredModel

    base = make_model(tmp_path / "base", tied=False, **SHAPE)
    section = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), section)
    model.save_pretrained(tmp_path / "adapter")
    reshard(StoredModel(tmp_path / "adapter", base=base), RankLayout(tp=2, pp=3), tmp_path / "divided")
    reshard(StoredModel(tmp_path / "divided"), RankLayout(), tmp_path / "back")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {path.name for path in (tmp_path / "back").iterdir()}
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    whole = load_file(tmp_path / "adapter/adapter_model.safetensors")
    part = load_file(tmp_path / "divided/model-rank-5-part-0.safetensors")  # the second half of the last layer
    assert {name for name in whole if ".layers.2." in name} == set(part)
    layers = [name.removesuffix(".lora_A.weight") for name in part if name.endswith("lora_A.weight")]
    assert len(layers) == 7
    for layer in layers:
        mine, all_of_it = (
            tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"] for tensors in (part, whole)
        )
        dim = 1 if layer.endswith(("o_proj", "down_proj")) else 0
        torch.testing.assert_close(mine, all_of_it.chunk(2, dim)[1])
        if dora:
            scale = whole[f"{layer}.lora_magnitude_vector"]
            assert torch.equal(part[f"{layer}.lora_magnitude_vector"], scale if dim else scale.chunk(2)[1])


def test_fused_projections_are_divided_by_shards_alone(tmp_path: Path) -> None:
    """Phi-3's queries, keys and values are one matrix, of which a rank would have three ranges."""
    from contracts.errors import UserError
    from reallocation.layouts import RankLayout
    from reallocation.resharding import reshard
    from reallocation.stored import StoredModel

    model = make_model(tmp_path / "model", kind="phi3", tied=False, **SHAPE)
    for text in ("tp=2", "pp=2"):
        with pytest.raises(UserError, match=r"is a Phi3ForCausalLM; tensor and pipeline .* shard=flat divide any"):
            reshard(StoredModel(model), RankLayout.parse(text), tmp_path / "divided")
    reshard(StoredModel(model), RankLayout.parse("dp=3,shard=rows"), tmp_path / "divided")
    reshard(StoredModel(tmp_path / "divided"), RankLayout(), tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


WIDE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096,
}  # fmt: skip
DIVIDED = ({"tp": 2}, {"pp": 2}, {"dp": 2, "zero": "fsdp2"})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes says of every layout."""
    folder = tmp_path_factory.mktemp("slices")
    model = make_model(folder / "model", **WIDE)
    script = [str(Path(__file__).with_name("slices_ranks.py")), str(folder), str(model), *map(json.dumps, DIVIDED)]
    # What is freed is given back at once, so that what a load leaves does not hide what the next one takes.
    environment = {**os.environ, "PYTHONPATH": ":".join([str(ROOT), *sys.path]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, *script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_bytes()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", DIVIDED, ids=["tp", "pp", "fsdp2"])
def test_slices_are_what_a_process_keeps_of_the_whole_model(
    parallel: dict[str, Any], loaded: list[dict[str, Any]]
) -> None:
    for report in loaded:
        same = report[json.dumps(parallel)]["same"]
        assert len(same) > 10
        assert all(same)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", DIVIDED, ids=["tp", "pp", "fsdp2"])
def test_a_process_that_reads_slices_takes_its_share_and_one_bucket(
    parallel: dict[str, Any], loaded: list[dict[str, Any]]
) -> None:
    from training.slices import PIECE

    bucket = 2 * 4 * PIECE  # bytes of a piece as it is read, and as numbers of another format
    for report in loaded:
        found = report[json.dumps(parallel)]
        most = found["share"] + bucket + (16 << 20)  # what Python and torch take for any model
        assert found["grown"] < most < found["model"]


def test_slices_have_the_master_weights_of_the_last_training(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from contracts.fingerprint import file_sha256
    from modeling.master import WEIGHTS_DIGEST, split, weights_digest
    from reallocation.layouts import GlobalTensor, part_of
    from reallocation.live import slice_of
    from training.slices import WeightSlices

    name = "model.layers.0.mlp.down_proj.weight"
    whole = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    upper, rest = split(whole)
    save_file({name: upper}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "master").mkdir()
    owner = weights_digest({"model.safetensors": file_sha256(tmp_path / "model.safetensors")})
    save_file({name: rest}, tmp_path / "master/model.safetensors", {WEIGHTS_DIGEST: owner})
    part = part_of(GlobalTensor(name, "F32", (24, 16)), (1, 4, 12), sharding="rows", shards=3, shard=1)
    found, rounded = torch.empty(8, 8), torch.empty(8, 8, dtype=torch.bfloat16)
    for into in (found, rounded):
        WeightSlices(tmp_path).read([f"model.{name}"], part, into)
    assert torch.equal(found, whole[8:16, 4:12])
    assert torch.equal(rounded, slice_of(upper, part))
    with pytest.raises(RuntimeError, match=r"has no model\.other"):
        WeightSlices(tmp_path).read(["model.other"], part, found)


def test_a_published_checkpoint_is_divided_and_put_together_again(
    models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    """With its remainders to fp32, its log and its manifest, to which every file still belongs."""
    from contracts.artifacts import Artifact
    from reallocation.layouts import RankLayout
    from reallocation.resharding import reshard
    from reallocation.stored import StoredModel

    published = run_here("policy", **dpo_settings(models, pairs, tmp_path / "policy", max_steps=1, dtype="bfloat16"))
    assert any(file.path.startswith("master/") for file in published.manifest.files)
    reshard(StoredModel(published.path), RankLayout(tp=2, pp=2), tmp_path / "divided")
    reshard(StoredModel(tmp_path / "divided"), RankLayout(), tmp_path / "back")
    again = Artifact.open(tmp_path / "back")
    assert again.damage() == []
    assert again.manifest == published.manifest
    names = [
        sorted(path.relative_to(each).as_posix() for path in each.rglob("*")) for each in (published.path, again.path)
    ]
    assert names[0] == names[1]
