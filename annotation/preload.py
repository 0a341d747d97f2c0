"""Imports the libraries of the annotation stages in the process that they are forked from (contracts/warm.py)."""

import contextlib
import importlib
from collections.abc import Sequence


def preload(libraries: Sequence[str]) -> None:
    """Import the libraries that the stages use; if vLLM is among them, set its environment variables first."""
    if "vllm" in libraries:
        import torch

        from modeling.vllm_process import set_environment

        set_environment(on_gpu=torch.cuda.is_available())
    from modeling.preload import preload as preload_modeling

    preload_modeling()

    with contextlib.suppress(ImportError):  # pyarrow imports it with its first column, where it is installed
        importlib.import_module("pandas")
