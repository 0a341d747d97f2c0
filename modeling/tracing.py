"""Traces of what torch computes, as chrome://tracing, Perfetto and TensorBoard read them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def traced(path: Path) -> Iterator[None]:
    """Write a trace of what is computed inside, on all devices, to a file NAME.json.gz.

    A trace that cannot be written is told, and nothing more: the computation is not to be lost for it.
    """
    with torch.profiler.profile(record_shapes=True) as profile:
        yield
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        print(f"no trace was written to {path}: {error}", flush=True)
    else:
        print(f"trace: {path}", flush=True)
