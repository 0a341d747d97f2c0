"""Files of accelerate and DeepSpeed as a layout: taken, or refused with the keys that say the same here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from contracts.config import validate
from contracts.errors import UserError
from contracts.yaml_text import dump
from training.config import SftConfig
from training.launch import processes_of_accelerate

ACCELERATE = {"compute_environment": "LOCAL_MACHINE", "machine_rank": 0, "mixed_precision": "bf16", "num_machines": 1}
ZERO = {"zero_stage": 3, "zero3_init_flag": True, "gradient_accumulation_steps": 1, "offload_param_device": "cpu",
        "offload_optimizer_device": "cpu"}  # fmt: skip


def layout_of(tmp_path: Path, data: Any, name: str = "layout.yaml") -> dict[str, Any]:
    file = tmp_path / name
    file.write_text(json.dumps(data, indent="\t") if name.endswith("json") else dump(data))
    settings = {"output": "x", "model": "m", "demonstrations": "d", "parallel": str(file)}
    return validate(SftConfig, settings, "test").parallel.model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        ({**ACCELERATE, "distributed_type": "NO", "num_processes": 8}, {"dp": 1}),
        ({**ACCELERATE, "distributed_type": "MULTI_GPU", "num_processes": 4}, {"dp": 4}),
        ({**ACCELERATE, "distributed_type": "MULTI_CPU", "num_processes": 2}, {"dp": 2}),
        ({**ACCELERATE, "distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2},
         {"dp": 16, "nodes": 2}),
        ({**ACCELERATE, "distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": ZERO},
         {"dp": 8, "zero": 3, "offload": ["optimizer", "param"]}),
        ({**ACCELERATE, "distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_version": 2}},
         {"dp": 8, "zero": "fsdp2"}),
        ({**ACCELERATE, "distributed_type": "MULTI_GPU", "num_processes": 8,
          "parallelism_config": {"parallelism_config_tp_size": 2}}, {"dp": 4, "tp": 2}),
    ],
)  # fmt: skip
def test_an_accelerate_file_is_taken(tmp_path: Path, data: dict[str, Any], layout: dict[str, Any]) -> None:
    assert layout_of(tmp_path, data) == layout


def test_a_deepspeed_file_is_taken(tmp_path: Path) -> None:
    zero = {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    data = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}  # fmt: skip
    assert layout_of(tmp_path, data, "ds.json") == {"zero": 2, "offload": ["optimizer"]}


@pytest.mark.parametrize(
    ("data", "complaints"),
    [
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5, "train_batch_size": 64,
          "optimizer": {"type": "AdamW", "params": {"lr": 1e-6}}},
         ["parallel={zero: 2}", "training.max_grad_norm=0.5", "training.global_batch=64",
          "training.learning_rate=1e-06"]),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, ["training.dtype=bfloat16 for fp16"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["a device nvme"]),
        ({**ACCELERATE, "distributed_type": "MEGATRON_LM", "num_processes": 8}, ["distributed_type is MEGATRON_LM"]),
        ({**ACCELERATE, "distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": "x"}},
         ["zero_stage is 'x'"]),
        ({"layers": 3}, ["are neither those of accelerate nor of DeepSpeed"]),
        ([], ["expected `key: value` lines, found a list"]),
    ],
)  # fmt: skip
def test_what_is_more_than_a_layout_is_said_in_our_keys(tmp_path: Path, data: Any, complaints: list[str]) -> None:
    with pytest.raises(UserError) as error:
        layout_of(tmp_path, data, "ds.json")
    for complaint in complaints:
        assert complaint in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("nothing.json", "nothing.yaml"):
        settings = {"output": "x", "model": "m", "demonstrations": "d", "parallel": str(tmp_path / name)}
        with pytest.raises(UserError, match="does not exist"):
            validate(SftConfig, settings, "test")


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("python /env/bin/accelerate launch --cpu --num_processes 2 -m training sft", 2),
        ("/env/bin/accelerate launch --num_processes=4 -m training sft", 4),
        ("python -m accelerate.commands.launch --num-processes 3 x.py", 3),
        ("bash -c something --num_processes 2", 0),
        ("python /env/bin/accelerate launch -m training sft", 0),
    ],
)
def test_how_many_processes_were_asked_for(
    command: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert processes_of_accelerate(command.split()) == count


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_of_two_is_an_error(
    models: dict[str, Path], demonstrations: Path, tmp_path: Path
) -> None:
    (tmp_path / "cpu.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "cpu.yaml")]
    command += ["-m", "training", "sft", f"model={models['tied']}", f"demonstrations={demonstrations}"]
    result = subprocess.run(
        [*command, f"output={tmp_path / 'out'}"], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert result.returncode != 0
    assert "was asked for 2 processes, but has started one" in result.stderr
    assert "parallel={dp: 2}" in result.stderr
    assert not (tmp_path / "out").exists()
