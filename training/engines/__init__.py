"""How a model is spread over processes; `base.py` says what the training loop asks of an engine."""

import torch

from training.config import TrainingConfig
from training.engines.base import Engine


def start(config: TrainingConfig, dtype: torch.dtype) -> Engine:
    """Join the other processes, in the parallel layout that was asked for and no other."""
    from training.engines.accelerated import AcceleratedEngine

    return AcceleratedEngine(config, dtype)
