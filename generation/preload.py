"""What the stages of this package import, for the process that they are forked from (contracts/warm.py)."""

import importlib.util
import os
import warnings


def preload() -> None:
    """Import it, with the variables that it is always imported with."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # opens no device: a fork could not open it again
    import torch

    from generation.vllm_engine import set_environment

    set_environment(on_gpu=torch.cuda.is_available())

    if importlib.util.find_spec("vllm") is None:
        pass
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm import LLM, SamplingParams  # noqa: F401
