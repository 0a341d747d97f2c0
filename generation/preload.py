"""Imports the generation stage's libraries in the process that the stage is forked from (contracts/warm.py)."""

import importlib.util
import warnings
from collections.abc import Sequence


def preload(libraries: Sequence[str]) -> None:
    """Set the environment variables that must precede the imports, and import the libraries."""
    import torch

    from modeling.preload import preload as preload_modeling
    from modeling.vllm_process import set_environment

    on_gpu = torch.cuda.is_available()
    set_environment(on_gpu=on_gpu)
    if "vllm" in libraries and importlib.util.find_spec("vllm") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm import LLM, SamplingParams  # noqa: F401

            if not on_gpu:
                import vllm.v1.worker.cpu_worker
                import vllm.v1.worker.mamba_utils  # noqa: F401
    preload_modeling()

    import generation.run  # noqa: F401
