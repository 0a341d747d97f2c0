"""Runs `python -m generation` with vLLM's workers as forks of the stage, as they are on GPUs.

On a CPU vLLM starts new processes for them, each of which imports vLLM.
"""

import multiprocessing
import runpy

from vllm.v1.executor import multiproc_executor


def fork_workers() -> None:
    """Make vLLM fork the workers of this process's engines."""
    assert callable(multiproc_executor.get_mp_context)
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")


if __name__ == "__main__":
    fork_workers()
    runpy.run_module("generation", run_name="__main__", alter_sys=True)
