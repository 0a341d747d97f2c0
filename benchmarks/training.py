"""Compares Ratchet with TRL: useful tokens trained per CPU second.

    .venv/bin/python benchmarks/training.py

The last line is one JSON object with the ratios (above 1: Ratchet is faster). The method is described in
benchmarks/README.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import workload  # noqa: E402
from benchmarks.side import Child  # noqa: E402

PPO_VERSION = "1.12.0"
"""The last version of TRL with a PPO trainer."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**35), "MALLOC_TRIM_THRESHOLD_": str(2**35), "MALLOC_TOP_PAD_": str(2**28)}
"""Makes glibc keep freed memory. By default it returns large tensors to the kernel, and page faults take a third of
TRL's time."""
SAME_WORK = 1e-3
"""The largest allowed relative difference between the sides' first results."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and return the exit code, which is 0 if all comparisons succeeded."""
    options = parse(arguments)
    shape = workload.Shape(layers=options.layers)
    environment = {
        **os.environ,
        **ALLOCATOR,
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    settings = {
        "seed": 0,
        "threads": options.threads,
        "device": "cpu",
        "optimizer": options.optimizer,
        "learning_rate": 1e-6,
        "weight_decay": 0.0,
        "beta": 0.1,
        "ppo_epochs": options.ppo_epochs,
        "micro_batch_tokens": options.micro_batch_tokens,
        "trl_pairs": options.trl_pairs,
        "trl_rollouts": options.trl_rollouts,
    }
    found: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only or ("dpo_vs_trl_long_prompt", "dpo_vs_trl_short_prompt", "ppo_vs_trl"):
            ppo = name == "ppo_vs_trl"
            answer = options.ppo_answer if ppo else options.answer
            prompt = options.short_prompt if "short" in name else answer
            count = options.rollouts if ppo else options.pairs
            make: Callable[..., list[Any]] = workload.rollouts if ppo else workload.pairs
            batches = []
            for number in range(1 + options.repetitions):
                small = 1 if number else 4  # the first batch warms up
                lengths = {"prompt": max(prompt // small, 4), "answer": max(answer // small, 4)}
                batches.append(make(shape, count=count, **lengths, spread=options.spread, seed=number))
            path = Path(scratch, f"{name}.json")
            workload.write(path, settings, shape, batches)
            try:
                trl = {**environment, "PYTHONPATH": f"{get_ppo()}{os.pathsep}{ROOT}"} if ppo else environment
                modules = ("ours_ppo", "trl_ppo") if ppo else ("ours_dpo", "trl_dpo")
                found[name] = duel(name, options.python, modules, path, (environment, trl), options.repetitions)
            except RuntimeError as error:
                problems[name] = str(error)
                print(f"{name}: {error}", flush=True)
    report = {
        **{name: entry["ratio"] for name, entry in found.items()},
        **dict.fromkeys(problems),
        "unit": "useful tokens per CPU-second, ours / TRL",
        "comparisons": found,
        "problems": problems,
        "settings": {
            **{name: value for name, value in vars(options).items() if name != "python"},
            **settings,
            "shape": vars(shape),
            "allocator": ALLOCATOR,
        },
    }
    print(json.dumps(report))
    return 1 if problems else 0


def duel(
    name: str,
    python: str,
    modules: tuple[str, str],
    path: Path,
    environments: tuple[dict[str, str], dict[str, str]],
    repetitions: int,
) -> dict[str, Any]:
    """Let both sides do the same units in turns; each begins every other unit.

    Raises:
        RuntimeError: a side failed, or the sides do not compute the same loss.
    """
    sides: list[Child] = []
    lines: list[list[dict[str, Any]]] = [[], []]
    try:
        for module, environment, end in zip(modules, environments, (".ours", ".trl"), strict=True):
            own = path.with_suffix(end)
            own.write_bytes(path.read_bytes())
            sides.append(Child(python, module, own, environment))
        for unit in range(1 + repetitions):
            for number in (0, 1) if unit % 2 else (1, 0):
                lines[number].append(sides[number].unit())
            ours, trl = lines[0][-1], lines[1][-1]
            turn = f"{name} {f'repetition {unit}' if unit else 'warm-up'}"
            ratio = speed(ours) / speed(trl)
            print(f"{turn}: ours {speed(ours):.1f}, TRL {speed(trl):.1f} tokens/CPU-s, ratio {ratio:.2f}", flush=True)
    finally:
        for side in sides:
            side.close()
    difference = require_same(name, lines[0][0], lines[1][0])
    ours_lines, trl_lines = lines[0][1:], lines[1][1:]
    ratios = [speed(ours) / speed(trl) for ours, trl in zip(ours_lines, trl_lines, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "difference": difference,
        "ours": summary(sides[0], ours_lines),
        "trl": summary(sides[1], trl_lines),
    }


def speed(line: dict[str, Any]) -> float:
    """The useful tokens per CPU second of a unit."""
    return float(line["useful_tokens"] / line["cpu_seconds"])


def summary(side: Child, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of a side's units."""
    phases = {name: round(statistics.median(line["phases"][name] for line in lines), 3) for name in lines[0]["phases"]}
    return {
        **side.facts,
        "tokens_per_cpu_second": round(statistics.median(map(speed, lines)), 2),
        "useful_tokens": [line["useful_tokens"] for line in lines],
        "cpu_seconds": [round(line["cpu_seconds"], 3) for line in lines],
        "phases": phases,
        "peak_memory_gib": round(max(line["peak_memory_gib"] for line in lines), 2),
    }


def require_same(name: str, ours: dict[str, Any], trl: dict[str, Any]) -> float:
    """The relative difference of the sides' results before any update: DPO's loss; for PPO, -log pi of the rollouts.

    Raises:
        RuntimeError: the sides counted different tokens, or the difference is too large.
    """
    if ours["useful_tokens"] != trl["useful_tokens"]:
        raise RuntimeError(
            f"{name}: the sides counted {ours['useful_tokens']} and {trl['useful_tokens']} useful tokens"
        )
    key = "loss" if "loss" in ours else "entropy"
    difference = abs(ours[key] - trl[key]) / abs(trl[key])
    if difference > SAME_WORK:
        raise RuntimeError(
            f"{name}: ours computes {key} {ours[key]}, TRL {trl[key]}: the sides do not do the same work"
        )
    return float(difference)


def get_ppo() -> Path:
    """The folder with TRL's last version with PPO: from the cache, or downloaded by pip from its configured index.

    Raises:
        RuntimeError: pip cannot download it.
    """
    cache = Path(os.environ.get("RATCHET_HOME", Path.home() / ".cache" / "ratchet"), "benchmarks", f"trl-{PPO_VERSION}")
    if not cache.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", scratch]
            process = subprocess.run([*command, f"trl=={PPO_VERSION}"], capture_output=True, text=True, check=False)
            wheels = list(Path(scratch).glob("*.whl"))
            if process.returncode or not wheels:
                raise RuntimeError(f"pip cannot download trl=={PPO_VERSION}: {process.stderr.strip()[-500:]}")
            part = cache.with_name(f"{cache.name}.{os.getpid()}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extractall(part)
            part.rename(cache)
    return cache


def find_python() -> str:
    """The interpreter of the training environment, or this one if there is no such environment."""
    tool = ROOT / ".venv" / "bin" / "pipeline"
    if tool.is_file():
        command = [str(tool), "env", "python", "training"]
        process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if process.returncode == 0 and process.stdout.strip():
            return process.stdout.strip()
    return sys.executable


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; lengths are medians in tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ("dpo_vs_trl_long_prompt", "dpo_vs_trl_short_prompt", "ppo_vs_trl")
    add("only", nargs="*", help=f"comparisons: {', '.join(names)}; all by default")
    add("--repetitions", type=int, default=3)
    add("--layers", type=int, default=30, help="layers of a Llama with otherwise SmolLM2-135M's shape (30)")
    add("--threads", type=int, default=1)
    add("--optimizer", choices=("adamw", "sgd"), default="adamw")
    add("--pairs", type=int, default=4, help="pairs per optimizer step")
    add("--answer", type=int, default=96, help="tokens of an answer, and of a long prompt")
    add("--short-prompt", type=int, default=12)
    add("--rollouts", type=int, default=8, help="rollouts per batch of PPO")
    add("--ppo-answer", type=int, default=48, help="tokens of PPO's answers and prompts")
    add("--ppo-epochs", type=int, default=1)
    add("--spread", type=float, default=0.5, help="standard deviation of the logarithm of lengths")
    add("--micro-batch-tokens", type=int, default=2048, help="tokens per micro-batch of Ratchet")
    add("--trl-pairs", type=int, default=1, help="pairs per micro-batch of TRL's DPO")
    add("--trl-rollouts", type=int, default=2, help="rollouts per micro-batch of TRL's PPO")
    add("--python", default=None, help="interpreter of the training environment")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(names):
        parser.error(f"unknown comparison {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    options.python = options.python or find_python()
    return options


if __name__ == "__main__":
    sys.exit(main())
