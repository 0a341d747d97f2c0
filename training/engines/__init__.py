"""Training engines, which distribute a model over processes; `base.py` has their interface."""

import torch

from training.config import TrainingConfig
from training.engines.base import TrainingEngine


def create_engine(config: TrainingConfig, dtype: torch.dtype) -> TrainingEngine:
    """Create the engine for the config's parallel layout, and join the other processes.

    Raises:
        UserError: the processes that run have another layout.
    """
    if config.parallel.is_native:
        from training.engines.native import NativeEngine

        return NativeEngine(config.parallel, dtype)
    from training.engines.accelerated import AcceleratedEngine

    return AcceleratedEngine(config, dtype)
