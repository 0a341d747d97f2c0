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
    ]
    script = Path(__file__).with_name("reallocation_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed is given back
    command = [sys.executable, str(script), str(folder), *map(str, models)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
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
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    script = [str(Path(__file__).with_name("slices_ranks.py")), str(folder), str(model), *map(json.dumps, DIVIDED)]
    # What is freed is given back at once, so that what a load leaves does not hide what the next one takes.
    environment = {**os.environ, "PYTHONPATH": ":".join([str(ROOT), *sys.path]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, *torchrun, *script], env=environment, capture_output=True, text=True, timeout=300, check=False
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
    from modeling.master import BELONGS_TO, belonging, split
    from reallocation.layouts import GlobalTensor, part_of
    from reallocation.live import slice_of
    from training.slices import WeightSlices

    name = "model.layers.0.mlp.down_proj.weight"
    whole = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    upper, rest = split(whole)
    save_file({name: upper}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "master").mkdir()
    owner = belonging({"model.safetensors": file_sha256(tmp_path / "model.safetensors")})
    save_file({name: rest}, tmp_path / "master/model.safetensors", {BELONGS_TO: owner})
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
