"""How a model is spread over processes; `base.py` says what the training loop asks of an engine."""

import torch

from training.config import TrainingConfig
from training.engines.base import TrainingEngine


def start(config: TrainingConfig, dtype: torch.dtype) -> TrainingEngine:
    """Join the other processes, in the parallel layout that was asked for and no other."""
    if config.parallel.is_native:
        from training.engines.native import NativeEngine

        return NativeEngine(config.parallel, dtype)
    from training.engines.accelerated import AcceleratedEngine

    return AcceleratedEngine(config, dtype)
