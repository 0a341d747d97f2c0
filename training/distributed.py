"""The processes of one training: start, agree, end."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn

from contracts.config import read_yaml
from contracts.errors import UserError
from training.config import TrainingConfig

COLLECTIVE_DEADLINE = timedelta(minutes=30)
"""How long a process waits for the others in one collective before it gives up."""


def pick_dtype(config: TrainingConfig) -> torch.dtype:
    """The number format that `auto` stands for on this machine."""
    if config.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def start(config: TrainingConfig, dtype: torch.dtype) -> Accelerator:
    """Join the other processes, in the parallel layout that was asked for and no other.

    accelerate falls back without a word: to one process (distributed_type MULTI_CPU, or --cpu --num_processes N), and
    from DeepSpeed to plain data parallelism (`Accelerator(cpu=True)`). The results are right in either case, so only
    asking it afterwards shows what really runs.

    Raises:
        UserError: the number of processes or the ZeRO stage is another than the config declares.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed:
        _require_no_compiler()
    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        # With cpu=True accelerate ignores DeepSpeed; without it and without a backend named, it counts one process.
        cpu=on_cpu and not deepspeed,
        kwargs_handlers=[
            InitProcessGroupKwargs(backend="gloo" if on_cpu and deepspeed else None, timeout=COLLECTIVE_DEADLINE)
        ],
    )
    declared = declared_zero_stage(config.accelerate_config)
    if declared is not None and declared != zero_stage(accelerator):
        raise UserError(
            f"{config.accelerate_config} declares ZeRO stage {declared}, but {zero_stage(accelerator)} is running "
            "(0: no DeepSpeed). Start the stage without `accelerate launch` of your own, or give it this file."
        )
    if accelerator.num_processes != config.processes:
        raise UserError(
            f"{accelerator.num_processes} process(es) were started, but processes={config.processes}. Set processes "
            "to the number started; on CPUs use distributed_type MULTI_GPU with use_cpu: true, never MULTI_CPU."
        )
    if zero_stage(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = 1  # only used for DeepSpeed's throughput log
        settings["gradient_accumulation_steps"] = 1  # the loop decides where a step ends
        settings["gradient_clipping"] = config.max_grad_norm
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return accelerator


def declared_zero_stage(file: Path | None) -> int | None:
    """The ZeRO stage of a file for `accelerate launch`, 0 without DeepSpeed; None where it does not say."""
    if file is None:
        return None
    settings = read_yaml(file)
    if settings.get("distributed_type") != "DEEPSPEED":
        return 0
    stage = (settings.get("deepspeed_config") or {}).get("zero_stage")
    return None if stage is None else int(stage)


def zero_stage(accelerator: Accelerator) -> int:
    """ZeRO stage; 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.state.deepspeed_plugin.zero_stage)


def add_up(accelerator: Accelerator, figures: dict[str, Any]) -> dict[str, float]:
    """The sum of each figure over all processes, which must give the same names in the same order."""
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64).detach().cpu() for value in figures.values()])
    total = accelerator.reduce(values.to(accelerator.device), "sum").tolist()
    return dict(zip(figures, total, strict=True))


def gather(accelerator: Accelerator, prepared: Any, module: nn.Module) -> dict[str, Any]:
    """The whole weights of `module`, which `prepared` wraps; under ZeRO-3 with every process's help, for rank 0 alone.

    Only under DeepSpeed by accelerate's own function, which imports DeepSpeed (2 s) wherever it is installed.
    """
    weights: dict[str, Any] = accelerator.get_state_dict(prepared) if zero_stage(accelerator) else module.state_dict()
    return weights


def _require_no_compiler() -> None:
    """DeepSpeed would compile a shared-memory collective for CPUs (minutes, g++); gloo gives the same bits."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
