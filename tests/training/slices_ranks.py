"""Loads a model like a training, by slices and as a whole, and writes a comparison to rank-R.json; one of two ranks.

torchrun --nproc_per_node 2 slices_ranks.py FOLDER MODEL PARALLEL...
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from reallocation_ranks import status

from modeling.loading import load_causal
from modeling.modules import TokenLogprobs
from training.engines.native import NativeEngine
from training.engines.sharding import local_tensor
from training.launch import exit_without_teardown
from training.parallel import ParallelConfig
from training.slices import WeightSlices


def prepared(model: Path, parallel: dict[str, Any], *, by_slices: bool) -> tuple[Any, dict[str, int]]:
    """Load the model into an engine. Returns the engine and, in bytes, its share, the model and the peak memory
    growth."""
    engine = NativeEngine(ParallelConfig(**parallel), torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    module = TokenLogprobs(load_causal(model, torch.float32, master=True, empty=by_slices))
    slices = WeightSlices(model) if by_slices else None
    engine.prepare(module, lambda parameters: torch.optim.SGD(parameters, lr=0.1), slices=slices)
    share = sum(local_tensor(part.local).nbytes for part in engine._parts.values() if part.local is not None)
    whole = sum(4 * math.prod(part.shape) for part in engine._parts.values())
    return engine, {"grown": status("VmHWM") - before, "share": share, "model": whole}


def main() -> None:
    folder, model, layouts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    found = {}
    for text in layouts:
        sliced, memory = prepared(model, json.loads(text), by_slices=True)
        whole, _ = prepared(model, json.loads(text), by_slices=False)
        pairs = [(part.local, whole._parts[name].local) for name, part in sliced._parts.items()]
        same = [one is other is None or torch.equal(local_tensor(one), local_tensor(other)) for one, other in pairs]
        buffers = [dict(engine._stage.named_buffers()) for engine in (sliced, whole)]
        same += [torch.equal(value, buffers[1][name]) for name, value in buffers[0].items()]
        same.append(list(buffers[0]) == list(buffers[1]) != [])
        found[text] = {"same": same, **memory}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with exit_without_teardown():
        main()
        sys.exit(0)
