"""Imports the training stages' libraries in the process that the stages are forked from (contracts/warm.py)."""

import os
from collections.abc import Sequence


def preload(libraries: Sequence[str]) -> None:
    """Import the modules of all training stages; and DeepSpeed on machines without GPUs, which it opens on others."""
    from modeling.preload import preload as preload_modeling

    preload_modeling()

    import torch

    import training.critic
    import training.policy
    import training.reward
    import training.sft  # noqa: F401
    from training.engines import accelerated  # noqa: F401

    if "deepspeed" in libraries and not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401
