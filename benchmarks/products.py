"""Measures how fast this processor multiplies float32 matrices, which bounds the speed of scoring on it.

    OMP_NUM_THREADS=1 $(.venv/bin/pipeline env python annotation) benchmarks/products.py

Prints billions of operations per CPU second for the matrices of SmolLM2-135M: with torch's `linear` (MKL), and with
oneDNN and weights in its own layout, as in scoring (modeling/cpu.py). Each figure is the best of twelve repetitions.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.workload import Shape  # noqa: E402

TOKENS = (256, 512, 1024, 2048)
REPETITIONS = 12


def main() -> None:
    """Measure and print a table."""
    import torch

    shape = Shape()
    heads = shape.hidden + 2 * shape.kv_heads * shape.hidden // shape.heads
    sizes = {
        "queries, keys, values": (shape.hidden, heads),
        "output": (shape.hidden, shape.hidden),
        "gate, up": (shape.hidden, shape.intermediate),
        "down": (shape.intermediate, shape.hidden),
    }
    with torch.inference_mode():
        for name, (inner, outer) in sizes.items():
            weight = torch.randn(outer, inner)
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight)
            for tokens in TOKENS:
                states = torch.randn(tokens, inner)
                ways: dict[str, Callable[[], Any]] = {
                    "linear": lambda states=states, weight=weight: torch.nn.functional.linear(states, weight),  # type: ignore[misc]
                    "onednn": lambda states=states, laid_out=laid_out: torch.ops.mkldnn._linear_pointwise(  # type: ignore[misc]
                        states, laid_out, None, "none", [], ""
                    ),
                }
                best = {way: min(_seconds(compute) for _ in range(REPETITIONS)) for way, compute in ways.items()}
                speeds = {way: round(2e-9 * tokens * inner * outer / each, 1) for way, each in best.items()}
                print(f"{name}, {tokens} tokens: {speeds}", flush=True)


def _seconds(compute: Callable[[], Any]) -> float:
    start = time.process_time()
    compute()
    return time.process_time() - start


if __name__ == "__main__":
    main()
