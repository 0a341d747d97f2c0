"""Tests whether the plan found by `pipeline plan search` from one run is really faster on this machine.

    .venv/bin/python benchmarks/search.py
    .venv/bin/python benchmarks/search.py --iterations 2 --times 3 seed=1     # any keys of the config

Runs the quickstart with flattening, searches a plan using only the durations of that run's stages, then alternately
runs the chosen plan, flattening, and any plans given by --also. The last line is one JSON object. The exit code is 1 if
the chosen plan is slower than flattening by more than runs of the same plan differ.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose training.py is not the package

from contracts import yaml_text  # noqa: E402

TAKEN, FLATTENING = "taken", "flattening"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart", help="by default the quickstart")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--times", type=int, default=1, help="runs of each plan")
    parser.add_argument("--also", action="append", default=[], metavar="PLAN", help="also run this plan of the table")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        learned = run(folder, "learned", options, FLATTENING)
        print(f"{FLATTENING}, to learn from: {learned:.1f} s", flush=True)
        view = search(folder, options)
        plans = {FLATTENING: FLATTENING, TAKEN: write_plan(folder, TAKEN, view["plan"])}
        for plan in options.also:
            plans[plan] = write_plan(folder, plan, search(folder, options, "--take", plan)["plan"])
        seconds: dict[str, list[float]] = {plan: [] for plan in plans}
        for number in range(options.times):
            order = list(plans)[:: 1 if number % 2 else -1]
            for plan in order:
                seconds[plan].append(run(folder, f"{plan}-{number}", options, plans[plan]))
                print(f"{plan}: {seconds[plan][-1]:.1f} s", flush=True)
    expected = {row["name"]: row["seconds"] for row in view["plans"]}
    print(f"taken was {view['chosen']}: {view['reason']}")
    means = {plan: statistics.fmean(found) for plan, found in seconds.items()}
    noise = max(max(found) - min(found) for found in [*seconds.values(), [learned, *seconds[FLATTENING]]])
    for plan, mean in means.items():
        estimate = f", expected {expected[plan]:.1f} s" if plan in expected else ""
        print(f"{plan}: {mean:.1f} s{estimate}; {means[FLATTENING] / mean:.2f} times as fast as flattening")
    figures = {"learned": learned, "seconds": seconds, "expected": expected, "chosen": view["chosen"], "noise": noise}
    print(json.dumps(figures))
    return int(means[TAKEN] > means[FLATTENING] + noise)


def run(folder: Path, name: str, options: argparse.Namespace, placement: str) -> float:
    """Run the recipe with a placement. Returns the seconds that the whole command took."""
    settings = [f"directory={folder}", f"name={name}", f"placement={placement}"]
    start = time.monotonic()
    with (folder / f"{name}.log").open("wb") as log:
        command = ["run", options.config, "--iters", str(options.iterations), "--plain", *settings, *options.overrides]
        subprocess.run(
            [sys.executable, "-m", "pipelines", *command],
            stdout=log,
            stderr=log,
            env=isolated_environment(),
            check=True,
        )
    return time.monotonic() - start


def search(folder: Path, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Search a plan, using only the first run's durations. Returns the chosen search as the command shows it."""
    command = ["plan", "search", options.config, f"directory={folder}", *options.overrides]
    command += ["--iters", str(options.iterations), "--json", *more, "--runs", str(folder / "learned")]
    result = subprocess.run(
        [sys.executable, "-m", "pipelines", *command], stdout=subprocess.PIPE, env=isolated_environment(), check=True
    )
    found = json.loads(result.stdout)
    view: dict[str, Any] = found["searches"][found["taken"]]
    return view


def write_plan(folder: Path, name: str, section: dict[str, Any]) -> str:
    """Write a plan to a file, and return its path."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml_text.dump(section))
    return str(path)


def isolated_environment() -> dict[str, str]:
    """An environment without the profiles of other runs."""
    return {**os.environ, "RATCHET_PROFILES": "off", "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    raise SystemExit(main())
