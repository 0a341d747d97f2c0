"""Placement: which devices a stage uses. Flattening, for now: every stage uses all of them, one after another."""

import functools
import os
import subprocess

from annotation.config import ScoreConfig
from contracts.config import StageConfig
from generation.config import GenerationConfig
from training.config import TrainingConfig


def gpu_count() -> int:
    """GPUs that a process started from here would see; 0 without any, and where RATCHET_VARIANT=cpu ignores them."""
    if os.environ.get("RATCHET_VARIANT") == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name not in ("", "-1")])
    return _listed_gpus()


@functools.cache
def _listed_gpus() -> int:
    try:
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in result.stdout.splitlines()) if result.returncode == 0 else 0


def place(config: StageConfig, gpus: int) -> StageConfig:
    """The same stage spread over `gpus` devices, as far as the user has not said how many processes it has."""
    if isinstance(config, TrainingConfig):
        return _place_training(config, gpus)
    fields: dict[str, int] = {}
    if isinstance(config, GenerationConfig) and not config.servers:
        fields = {"replicas": gpus // config.tensor_parallel}
    elif isinstance(config, ScoreConfig) and config.kind != "rule":
        fields = {"replicas": gpus}
    update = {name: count for name, count in fields.items() if count > 1 and name not in config.model_fields_set}
    return config.model_copy(update=update)


def _place_training(config: TrainingConfig, gpus: int) -> TrainingConfig:
    """Data parallelism over what tp, pp and sp leave."""
    parallel = config.parallel
    dp = gpus // (parallel.tp * parallel.pp * parallel.sp)
    if dp <= 1 or "dp" in parallel.model_fields_set:
        return config
    return config.model_copy(update={"parallel": parallel.model_copy(update={"dp": dp})})
