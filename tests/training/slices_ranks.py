"""Starts two ranks that load a model like a training, by slices and as a whole, and write a comparison to rank-R.json.

python slices_ranks.py FOLDER MODEL PARALLEL...
"""

import json
import math
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from reallocation_ranks import status

from modeling.loading import load_causal
from modeling.modules import TokenLogprobs
from training.engines.native import NativeEngine
from training.engines.sharding import local_tensor
from training.launch import RENDEZVOUS_FILE, exit_without_teardown, join_ranks, rank_variables
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


def compare(folder: Path, model: Path, layouts: list[str]) -> None:
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


def work(rank: int, folder: Path, model: Path, layouts: list[str]) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", RENDEZVOUS_FILE: str(folder / "port")}
    os.environ.update(rank_variables(ParallelConfig(dp=2), 0, rank) | meeting)
    with exit_without_teardown():
        try:
            join_ranks()
            compare(folder, model, layouts)
        except BaseException:
            traceback.print_exc()
            raise
        sys.exit(0)


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    arguments = (Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    ranks = [context.Process(target=work, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
