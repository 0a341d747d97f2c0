"""Measures how much time warm processes save a run on one machine.

    .venv/bin/python benchmarks/warm.py
    .venv/bin/python benchmarks/warm.py --iterations 1 seed=1     # any keys of the config

Runs the quickstart with executor.warm=false and then with its default, compares the artifacts of both, and prints how
the stages spent their time. The last line is one JSON object. The exit code is 1 if an artifact differs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose training.py is not the package

from contracts.artifacts import Artifact  # noqa: E402
from contracts.manifest import MANIFEST  # noqa: E402
from pipelines.run.directory import RunDirectory  # noqa: E402
from pipelines.run.events import StagePublished  # noqa: E402

LOADING = ("import", "load")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs/quickstart.yaml"), help="by default the quickstart")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in ("cold", "warm")}
        seconds = {name: measure(path, options, warm=name == "warm") for name, path in runs.items()}
        artifacts = {name: digests(path) for name, path in runs.items()}
        parts = {name: parts_of(path, list(artifacts[name])) for name, path in runs.items()}
    different = sorted(place for place, digest in artifacts["cold"].items() if artifacts["warm"].get(place) != digest)
    for name in runs:
        where = ", ".join(f"{part} {value:.1f}" for part, value in parts[name].items())
        print(f"{name}: {seconds[name]:.1f} s; its stages: {where}; loading {100 * loading(parts[name]):.1f} %")
    print(f"warm is {seconds['cold'] / seconds['warm']:.2f} times as fast; {len(different)} artifacts differ")
    figures = {"seconds": seconds, "parts": parts, "artifacts": len(artifacts["cold"]), "different": different}
    print(json.dumps({**figures, "loading": {name: loading(parts[name]) for name in runs}}))
    return 1 if different else 0


def measure(run: Path, options: argparse.Namespace, *, warm: bool) -> float:
    """Run the config, and return the seconds that the whole command took."""
    command = [sys.executable, "-m", "pipelines", "run", options.config, "--iters", str(options.iterations), "--plain"]
    settings = [f"directory={run.parent}", f"name={run.name}", f"executor.warm={str(warm).lower()}"]
    start = time.monotonic()
    with (run.parent / f"{run.name}.log").open("wb") as log:
        subprocess.run([*command, *settings, *options.overrides], stdout=log, stderr=log, cwd=ROOT, check=True)
    return time.monotonic() - start


def digests(run: Path) -> dict[str, str]:
    """The digest of each artifact of a finished run."""
    found = (path.parent for path in sorted(run.rglob(MANIFEST)))
    return {path.relative_to(run).as_posix(): Artifact.open(path).manifest.digest for path in found}


def parts_of(run: Path, places: Sequence[str]) -> dict[str, float]:
    """The total seconds of all stages: `all` from the driver's events, and the parts that the stages recorded."""
    published = [event for event in RunDirectory(run).events() if isinstance(event, StagePublished)]
    total = Counter({"all": sum(event.seconds for event in published)})
    for place in places:
        for name, value in Artifact.open(run / place).manifest.seconds.items():
            total[name] += value
    return {name: round(value, 2) for name, value in total.items()}


def loading(parts: dict[str, float]) -> float:
    """The share of importing and loading in the stages' time."""
    return sum(parts.get(name, 0.0) for name in LOADING) / parts["total"]


if __name__ == "__main__":
    sys.exit(main())
