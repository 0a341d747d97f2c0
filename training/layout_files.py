"""Converts an accelerate or DeepSpeed config file into the section `parallel`: `parallel: my-accelerate.yaml`.

Only the parallel layout is read. A file with settings that affect results (batch size, optimizer, precision) is refused
with the names of the keys to set instead: a result never depends on a file outside of the config.
"""

from pathlib import Path
from typing import Any

from contracts.config import read_yaml
from contracts.errors import UserError

NEUTRAL = frozenset(
    "compute_environment debug downcast_bf16 enable_cpu_affinity machine_rank main_process_ip main_process_port "
    "main_training_function num_machines num_processes rdzv_backend same_network use_cpu distributed_type "
    "deepspeed_config fsdp_config parallelism_config gpu_ids dynamo_config dynamo_backend zero_optimization "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown "
    "communication_data_type prescale_gradients dump_state flops_profiler comms_logger memory_breakdown checkpoint "
    "zero_stage deepspeed_multinode_launcher deepspeed_hostfile deepspeed_moe_layer_cls_names".split()
)
"""Keys that describe the layout, or do not affect results."""
PREFIXES = ("tpu_", "zero3_", "fsdp_", "offload_")
"""Prefixes of further such keys."""
TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "DEEPSPEED", "FSDP")
ZERO_OF_STRATEGY = {"FULL_SHARD": "fsdp2", "1": "fsdp2", "SHARD_GRAD_OP": 2, "2": 2, "NO_SHARD": 0, "3": 0}
"""The value of `zero` for each of FSDP's sharding strategies, by name and number."""


def read_layout(path: Path) -> dict[str, Any]:
    """Read the fields of `parallel` from a file.

    Raises:
        UserError: it cannot be read, describes a layout that Ratchet does not support, or has other settings.
    """
    data = read_yaml(path)
    if "distributed_type" in data or "compute_environment" in data:
        layout, more = _from_accelerate(data, path)
    elif "zero_optimization" in data or "train_micro_batch_size_per_gpu" in data or "train_batch_size" in data:
        layout, more = _from_deepspeed(data)
    else:
        raise UserError(
            f"parallel is the file {path}, but its keys ({', '.join(map(str, list(data)[:5]))}) are neither those of "
            "accelerate nor of DeepSpeed. Write a layout, for example parallel={dp: 4, zero: 3}."
        )
    if more:
        words = ", ".join(f"{name}: {value}" for name, value in layout.items())
        raise UserError(
            f"{path} has settings other than the parallel layout. Write parallel={{{words}}} instead of the file, and "
            f"in addition: {'; '.join(more)}."
        )
    return layout


def _from_accelerate(data: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    distributed_type = str(data.get("distributed_type") or "NO").upper()
    if distributed_type not in TYPES:
        raise UserError(
            f"{path}: distributed_type is {distributed_type}, which Ratchet does not have. Write a layout: tp and pp "
            "divide layers, sp divides sequences, and zero shards (1, 2, 3 or fsdp2)."
        )
    layout: dict[str, Any] = {}
    more: list[str] = []
    if distributed_type == "DEEPSPEED":
        section = data.get("deepspeed_config") or {}
        if section.get("deepspeed_config_file"):
            layout, more = _from_deepspeed(read_yaml(path.parent / str(section["deepspeed_config_file"])))
        else:
            layout, more = {"zero": _number(section, "zero_stage", 2)}, _other_settings(section)
            offloaded = [
                name for name in ("optimizer", "param") if _offloads(section.get(f"offload_{name}_device"), more)
            ]
            layout |= {"offload": offloaded} if offloaded else {}
    elif distributed_type == "FSDP":
        section = data.get("fsdp_config") or {}
        strategy = str(section.get("fsdp_sharding_strategy", "FULL_SHARD")).upper()
        if strategy not in ZERO_OF_STRATEGY:
            raise UserError(f"{path}: fsdp_sharding_strategy is {strategy}. Write parallel={{zero: fsdp2}}, or 2.")
        layout = {"zero": ZERO_OF_STRATEGY[strategy]}
        if section.get("fsdp_offload_params") is True:
            more.append("zero=3 with offload=[optimizer, param] for fsdp_offload_params (only DeepSpeed offloads)")
        if section.get("fsdp_activation_checkpointing") is True:
            more.append("training.gradient_checkpointing=true for fsdp_activation_checkpointing")
    divided = data.get("parallelism_config") or {}
    for ours, names in (("tp", ["tp_size"]), ("sp", ["cp_size", "sp_size"])):
        for name in names:
            if (parts := _number(divided, f"parallelism_config_{name}", 1)) > 1:
                layout[ours] = parts
    others = layout.get("tp", 1) * layout.get("sp", 1)
    processes = 1 if distributed_type == "NO" else _number(data, "num_processes", 1)
    if processes % others:
        raise UserError(f"{path}: num_processes is {processes}, which tp · sp = {others} does not divide.")
    layout = {"dp": processes // others, **layout}
    if (machines := _number(data, "num_machines", 1)) > 1:
        layout["nodes"] = machines
    return layout, more + _other_settings(data)


def _from_deepspeed(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    section = data.get("zero_optimization") or {}
    more = _other_settings(data)
    layout: dict[str, Any] = {"zero": _number(section, "stage", 0)}
    offloaded = [
        name for name in ("optimizer", "param") if _offloads((section.get(f"offload_{name}") or {}).get("device"), more)
    ]
    return layout | ({"offload": offloaded} if offloaded else {}), more


def _offloads(device: Any, more: list[str]) -> bool:
    if device == "nvme":
        more.append("nothing for a device nvme, which Ratchet does not offload to")
    return bool(device == "cpu")


def _number(section: dict[str, Any], name: str, default: int) -> int:
    value = section.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{name} is {value!r}, but must be a whole number.")
    return value


def _other_settings(data: dict[str, Any]) -> list[str]:
    """Ratchet's keys for a file's settings other than the layout; "auto" counts as not set."""
    more: list[str] = []
    for name, value in data.items():
        if name in NEUTRAL or name.startswith(PREFIXES) or value in ("auto", None, {}, []):
            continue
        params = value.get("params", {}) if isinstance(value, dict) else {}
        if name == "gradient_clipping":
            more.append(f"training.max_grad_norm={value}")
        elif name in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size"):
            if name != "gradient_accumulation_steps" or value != 1:
                rows = value if name == "train_batch_size" else "ROWS"
                more.append(f"training.global_batch={rows} for {name}={value} (the rows of a step)")
        elif name in ("mixed_precision", "bf16", "fp16"):
            enabled = value.get("enabled") if isinstance(value, dict) else value
            if enabled in (True, "fp16") and (name == "fp16" or enabled == "fp16"):
                more.append("training.dtype=bfloat16 for fp16, in which nothing is trained here")
            elif enabled not in (False, True, "no", "bf16", "auto", None):
                more.append(f"training.dtype for {name}={enabled}")
        elif name == "optimizer":
            more.append(f"training.optimizer=adamw for {value.get('type') if isinstance(value, dict) else value}")
            names = {"lr": "learning_rate", "weight_decay": "weight_decay"}
            more += [f"training.{names[key]}={item}" for key, item in params.items() if key in names and item != "auto"]
        elif name == "scheduler":
            more.append("training.schedule and training.warmup_ratio for the scheduler")
        else:
            more.append(f"nothing for {name}, which Ratchet does not have")
    return list(dict.fromkeys(more))
