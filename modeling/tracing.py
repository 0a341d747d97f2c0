"""Records torch profiler traces, which chrome://tracing, Perfetto and TensorBoard can display."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def traced(path: Path) -> Iterator[None]:
    """Trace the computation in the context, on all devices, into a file NAME.json.gz.

    If the trace cannot be written, only a message is printed, so that the computation is not lost.
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
