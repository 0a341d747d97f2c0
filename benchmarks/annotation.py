"""Compares Ratchet with transformers' pipeline: answers scored by a reward model per CPU second.

    $(.venv/bin/pipeline env python annotation) benchmarks/annotation.py

The last line is one JSON object with the ratios (above 1: Ratchet is faster). The method is described in
benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import answers, workload  # noqa: E402
from benchmarks.side import Child  # noqa: E402
from pipelines.environments.launch import MALLOC_SETTINGS  # noqa: E402

SAME_WORK = 1e-4
"""The largest allowed difference between the sides' scores, relative to the largest score."""
OURS, PIPELINE = "ours", "pipeline-1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and return the exit code: 0 if all sides gave the same scores."""
    options = parse(arguments)
    shape = workload.Shape(layers=options.layers)
    cases = {
        f"{name}-k{k}": answers.Case(options.prompts, k, prompt, options.answer, options.spread)
        for name, prompt in (("long", options.answer), ("short", options.short_prompt))
        for k in (4, 8)
    }
    cases = {name: case for name, case in cases.items() if not options.only or name in options.only}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        answers.save_model(folder / "model", shape)
        (folder / "cases.json").write_text(json.dumps({name: case._asdict() for name, case in cases.items()}))
        plain = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))},
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        sides = {}
        wanted = {OURS: plain | MALLOC_SETTINGS, PIPELINE: plain}
        wanted |= {f"padded-{size}": plain | MALLOC_SETTINGS for size in options.batch_sizes}
        lines: dict[str, dict[str, list[dict[str, Any]]]] = {name: {case: [] for case in cases} for name in wanted}
        try:
            for name, environment in wanted.items():
                settings = folder / f"{name}.json"
                size = 0 if name == OURS else int(name.rpartition("-")[2])
                settings.write_text(json.dumps({"folder": str(folder), "batch_size": size}))
                module = "pipeline_scoring" if size else "ours_scoring"
                sides[name] = Child(sys.executable, module, settings, environment)
            for turn in range(options.repetitions):
                for case in cases:
                    order = list(sides)[:: -1 if turn % 2 else 1]
                    for name in order:
                        lines[name][case].append(sides[name].unit())
                    shown = {name: round(lines[name][case][-1]["cpu_seconds"], 2) for name in sides}
                    print(f"{case}, repetition {turn + 1}: CPU-seconds {shown}", flush=True)
            starts = {name: side.facts["start_cpu_seconds"] for name, side in sides.items()}
        finally:
            for side in sides.values():
                side.close()
    report = {case: compare({name: lines[name][case] for name in lines}, starts) for case in cases}
    problems = [case for case, found in report.items() if found["difference"] > SAME_WORK]
    print(
        json.dumps(
            {
                **{case: found["ratio"] for case, found in report.items()},
                "unit": "CPU-seconds of scoring, pipeline at batch size 1 / ours",
                "cases": report,
                "problems": problems,
                "settings": {
                    **vars(options),
                    "shape": vars(shape),
                    "cases": {name: case._asdict() for name, case in cases.items()},
                    "start_cpu_seconds": starts,
                    "allocator": MALLOC_SETTINGS,
                    "processor": platform.processor() or platform.machine(),
                },
            }
        )
    )
    return 1 if problems else 0


def compare(lines: dict[str, list[dict[str, Any]]], starts: dict[str, float]) -> dict[str, Any]:
    """The results of one case. Ratios are computed within each repetition; the median is reported."""
    units = {name: [line["cpu_seconds"] for line in of] for name, of in lines.items()}
    spent = units | {OURS: [line["phases"]["scoring"] for line in lines[OURS]]}
    reference = lines[PIPELINE][0]["scores"]
    scale = max(1.0, *map(abs, reference))
    difference = max(
        abs(one - other) / scale
        for of in lines.values()
        for line in of
        for one, other in zip(line["scores"], reference, strict=True)
    )
    padded = [name for name in spent if name.startswith("padded")]
    best = min(padded, key=lambda name: statistics.median(spent[name]), default=None)
    return {
        "ratio": _ratio(spent[PIPELINE], spent[OURS]),
        "ratio_of_whole_processes": _ratio(
            [starts[PIPELINE] + each for each in units[PIPELINE]], [starts[OURS] + each for each in units[OURS]]
        ),
        "ratio_to_best_padded": None if best is None else _ratio(spent[best], spent[OURS]),
        "best_padded": best,
        "difference": difference,
        "tokens": lines[OURS][0]["tokens"],
        "cpu_seconds": {name: [round(each, 3) for each in of] for name, of in spent.items()},
        "stage_cpu_seconds": [round(each, 3) for each in units[OURS]],
        "peak_memory_gib": {name: round(max(line["peak_memory_gib"] for line in of), 2) for name, of in lines.items()},
    }


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return round(statistics.median(their / our for their, our in zip(theirs, ours, strict=True)), 3)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; lengths are medians in tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("only", nargs="*", help="cases: long-k4, long-k8, short-k4, short-k8; all by default")
    add("--repetitions", type=int, default=3)
    add("--layers", type=int, default=30, help="layers of a Llama with otherwise SmolLM2-135M's shape (30)")
    add("--prompts", type=int, default=12, help="prompts with K answers each")
    add("--answer", type=int, default=96, help="tokens of an answer, and of a long prompt")
    add("--short-prompt", type=int, default=12)
    add("--spread", type=float, default=0.5, help="standard deviation of the logarithm of lengths")
    add("--batch-sizes", type=int, nargs="*", default=[4, 16], help="sizes of padded, length-sorted batches")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
