"""Starts eight processes that move models between all pairs of layouts. They do so in one program, because starting
takes most of the time.

    python reallocation_ranks.py FOLDER MODEL...

Each process writes its errors and its memory use to rank-R.json in the folder.
"""

import itertools
import json
import multiprocessing
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from reallocation.layouts import Division, GlobalTensor, RankLayout
from reallocation.live import reallocate, slice_of
from reallocation.planning import plan

PROCESSES = 8
LAYOUTS = [
    "tp=1", "tp=2", "tp=4,vocab=whole", "tp=8", "pp=2,layers=1+2", "dp=8,shard=flat", "dp=3,shard=rows",
    "dp=2,tp=2,pp=2", "dp=2,tp=2,pp=2,shard=rows",
]  # fmt: skip
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
BUCKET = 40 << 10
MEGABYTE = 1 << 20


def all_pairs(model: Path, rank: int) -> list[str]:
    """Move a model from each layout to each other one, whose ranks are other processes. Returns the errors."""
    whole = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_bytes())
    tensors = {name: GlobalTensor(name, NAMES[value.dtype], tuple(value.shape)) for name, value in whole.items()}
    divisions = [Division(RankLayout.parse(text), config, tensors) for text in LAYOUTS]
    wrong = []
    for source, target in itertools.product(divisions, divisions):
        what = f"{model.name}: {source.layout} to {target.layout}"
        places = range(PROCESSES - target.layout.ranks, PROCESSES)
        found = plan(tensors, source, target, target_processes=places)
        held = {name: slice_of(whole[name], part) for name, part in source.parts_of_rank(rank).items()}
        wanted = {name: slice_of(whole[name], part) for name, part in target.parts_of_rank(rank - places[0]).items()}
        targets = {name: torch.full_like(value, torch.nan) for name, value in wanted.items()}
        moved = reallocate(found, held, targets, bucket=BUCKET)
        if not all(torch.equal(bits(targets[name]), bits(value)) for name, value in wanted.items()):
            wrong.append(f"{what}: other numbers")
        if (moved.sent, moved.received) != (found.sent.get(rank, 0), found.received.get(rank, 0)):
            wrong.append(f"{what}: {moved} instead of {found.sent.get(rank)} and {found.received.get(rank)}")
        if moved.staged > BUCKET:
            wrong.append(f"{what}: {moved.staged} bytes of messages")
    return wrong


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.view(torch.int32 if value.element_size() == 4 else torch.int16)


def memory(rank: int) -> dict[str, int]:
    """Measure the peak memory growth of a process with a larger model, and the sizes of its target parts and bucket."""
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "intermediate_size": 8192,
    }  # fmt: skip
    names = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(8) for kind in ("up", "down")]
    tensors = {name: GlobalTensor(name, "F32", (8192, 256) if "up" in name else (256, 8192)) for name in names}
    source = Division(RankLayout(pp=4, dp=2, sharding="rows"), config, tensors)
    target = Division(RankLayout(tp=8), config, tensors)
    found = plan(tensors, source, target)
    held = {name: torch.full(part.shape, float(rank)) for name, part in source.parts_of_rank(rank).items()}
    bucket = 2 * MEGABYTE
    reallocate(
        found, held, {name: torch.empty(part.shape) for name, part in target.parts_of_rank(rank).items()}, bucket=bucket
    )
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    targets = {name: torch.zeros(part.shape) for name, part in target.parts_of_rank(rank).items()}
    share = sum(value.nbytes for value in targets.values())
    moved = reallocate(found, held, targets, bucket=bucket)
    return {"grown": status("VmHWM") - before, "share": share, "bucket": bucket, "staged": moved.staged}


def status(name: str) -> int:
    """A value of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def work(rank: int, folder: Path, models: list[Path]) -> None:
    report: dict[str, Any] = {"wrong": []}
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), PROCESSES)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=200))
        for model in models:
            report["wrong"] += all_pairs(model, rank)
        report["memory"] = memory(rank)
        dist.barrier()
    except Exception:
        report["wrong"].append(traceback.format_exc())
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    arguments = (Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
    ranks = [context.Process(target=work, args=(rank, *arguments)) for rank in range(PROCESSES)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
