"""The GPU check's own arithmetic, and its run on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks import gpu_check, workload
from modeling.rows import Response, Row

ROOT = Path(__file__).parents[2]
MINIMAL = """
import importlib.abc, importlib.util, sys
missing = {"pydantic", "msgspec", "datasets", "trl", "deepspeed", "peft", "pyarrow"}
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in missing else find(name, *rest)
sys.meta_path.insert(0, Missing())
from benchmarks.gpu_check import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_self_test_passes_with_torch_transformers_and_accelerate_alone(tmp_path):
    command = [sys.executable, "-c", MINIMAL, "--self-test", "--name", "here", "--results", str(tmp_path)]
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    report = json.loads((tmp_path / "here.json").read_text())
    assert report["passed"]
    assert report["correctness"]["shared_fp32"]["largest_logprob_difference"] < 1e-5
    assert report["dpo"]["tokens_per_second"] > 0
    assert report["ppo"]["critic"]["tokens_per_second"] > 0
    assert report["scoring"]["shared"]["answers"] == report["scoring"]["batch_1"]["answers"] > 0
    assert report["scoring"]["ratio"] > 0
    assert report["dpo"]["model_flops_utilisation"] is None
    assert report["trl_dpo"] == {"skipped": "trl and datasets not installed"}
    assert report["command"].startswith("bash scripts/gpu-check.sh --self-test")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "--self-test" in capsys.readouterr().err


def test_a_wrong_packing_does_not_pass(monkeypatch):
    right = gpu_check.pack

    def wrong(rows, packing, device):
        batch = right(rows, packing, device)
        return batch if packing == "padded" else batch._replace(position_ids=batch.position_ids + batch.position_ids)

    monkeypatch.setattr(gpu_check, "pack", wrong)
    assert not gpu_check.correctness(gpu_check.self_test(), torch.device("cpu"))["passed"]


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    shape = workload.Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocabulary=512)
    row = Row("0", np.arange(3, 23), tuple(Response(np.arange(start, start + 20)) for start in (30, 60)))
    module = gpu_check.make(shape, gpu_check.TokenValues, torch.device("cpu"), "shared")
    counter = FlopCounterMode(display=False)
    with counter:
        module(gpu_check.pack([row], "shared"))["values"].sum().backward()
    attention = 3 * 2 * shape.layers * shape.hidden * 2 * 40**2
    products = sum(value for name, value in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    assert gpu_check.flops(shape, [row], scores_tokens=False) - attention == products
    head = 3 * 2 * (shape.vocabulary - 1) * shape.hidden * 40
    assert (
        gpu_check.flops(shape, [row], scores_tokens=True) - gpu_check.flops(shape, [row], scores_tokens=False) == head
    )


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100", None),
    ],
)
def test_peaks_go_by_the_name_of_the_card(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert gpu_check.peak_flops(torch.device("cuda")) == peak


def test_micro_batches_hold_every_row_once_within_the_budget():
    rows = [Row(str(size), np.arange(1, 5), (Response(np.arange(size)),)) for size in (3, 60, 9, 12, 30, 2)]
    made = gpu_check.micro_batches(rows, 40)
    assert sorted(row.row_id for rows in made for row in rows) == sorted(row.row_id for row in rows)
    assert [len(rows) for rows in made if sum(len(row.prompt) + row.response_tokens for row in rows) > 40] == [1]


def test_where_the_memory_ends_micro_batches_shrink():
    budgets = []

    def measure(plan, device):
        budgets.append(plan.budget)
        if plan.budget > 3000:
            raise torch.OutOfMemoryError
        return {}

    plan = gpu_check.replace(gpu_check.self_test(), budget=8192)
    assert gpu_check.within_memory(measure, plan, torch.device("cpu")) == {"micro_batch_tokens": 2048}
    assert budgets == [8192, 4096, 2048]
