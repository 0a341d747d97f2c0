"""Measures how close a run comes to the shortest possible time, by strategy.

    .venv/bin/python benchmarks/placement.py --help

Drives runs with the real driver, keys, shards and manifests, but with stages that take a known time and compute nothing
(tests/pipelines/pretend.py), on devices that exist only by name. From the run's events:

    wall      time from the first stage's start to the last one's end
    planned   the plan's time, given the measured durations of the stages
    shortest  a lower bound: the critical path, or the busiest device's work, given these durations
    overlap   shortest / wall
    alone     the sum of these durations
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/pipelines")]

import yaml  # noqa: E402
from pipelines_smallest import PRETENDED  # noqa: E402
from pretend import set_seconds, write_interpreter  # noqa: E402

from contracts.artifacts import Artifact  # noqa: E402
from pipelines.config.load import load_run_config  # noqa: E402
from pipelines.planning.cluster import cluster_of  # noqa: E402
from pipelines.planning.placement import placed_graph  # noqa: E402
from pipelines.planning.scheduling import schedule, shortest_time, start_order  # noqa: E402
from pipelines.run.directory import RunDirectory  # noqa: E402
from pipelines.run.events import StagePublished, StageStarted  # noqa: E402

PPO = {
    "training": {"algorithm": "ppo"},
    "scorers": {"reward": {"kind": "reward_model", "model": "world:model"}},
    "critic": {"start": "policy"},
}
SECONDS = {"generation": 6.0, "reward": 4.0, "reference": 4.0, "values": 4.0, "training": 8.0, "critic": 4.0}
"""The durations of an iteration's stages by role; all others take only as long as a process takes to start and end."""


@dataclass(frozen=True)
class Measured:
    """The times of a run, from its events."""

    strategy: str
    devices: int
    iterations: int
    wall: float
    planned: float
    shortest: float
    alone: float
    overlap: float
    digests: dict[str, str]
    """The digests of all artifacts."""


def measure(
    folder: Path,
    name: str,
    placement: dict[str, Any],
    *,
    devices: int = 4,
    iterations: int = 2,
    seconds: dict[str, float] = SECONDS,
    **config: Any,
) -> Measured:
    """Run stages of these durations with a placement."""
    folder.mkdir(parents=True, exist_ok=True)
    interpreter = write_interpreter(folder / "interpreter")
    set_seconds(folder / "interpreter", {**{f"heldout/{role}": 0.0 for role in seconds}, **seconds})
    environments = {stage: {"python": str(interpreter)} for stage in ("generation", "annotation", "training")}
    written = {
        **PRETENDED, **PPO, **config,
        "directory": str(folder), "environments": environments, "placement": placement,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(written))
    names = ",".join(map(str, range(devices)))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": names, "RATCHET_VARIANT": "auto", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipelines", "run", str(path), "--iters", str(iterations), "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    kept = {variable: os.environ.get(variable) for variable in ("CUDA_VISIBLE_DEVICES", "RATCHET_VARIANT")}
    os.environ.update({variable: environment[variable] for variable in kept})
    try:
        return read(name, devices, iterations, path)
    finally:
        for variable, value in kept.items():
            os.environ.pop(variable) if value is None else os.environ.update({variable: value})


def read(name: str, devices: int, iterations: int, path: Path) -> Measured:
    """Read the times of a finished run from its events."""
    config = load_run_config(path, [])
    graph = placed_graph(config, iterations)
    begun: dict[str, float] = {}
    took: dict[str, float] = {}
    ends = []
    for event in RunDirectory(config.run_directory).events():
        if isinstance(event, StageStarted):
            begun[event.stage] = event.time
        elif isinstance(event, StagePublished):
            took[event.stage] = event.time - begun[event.stage]
            ends.append(event.time)
    wall = max(ends) - min(begun.values())
    bound = shortest_time(graph.nodes.values(), took)
    times = schedule(start_order(graph, config), cluster_of(config), took)
    planned = max(end for _, end in times.values())
    digests = {name: Artifact.open(node.output).manifest.digest for name, node in graph.nodes.items()}
    return Measured(name, devices, iterations, wall, planned, bound, sum(took.values()), bound / wall, digests)


def main() -> int:
    """Print a line for each strategy, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategies", nargs="*", default=["flattening", "interleaving", "separation"])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--pools", type=json.loads, help='{"generation": 2, "scoring": 1, "training": 1}')
    parser.add_argument("--streaming", action="store_true", help="run each strategy a second time, with streaming")
    parser.add_argument("--seconds", type=json.loads, default=SECONDS, help="durations of stages by role, as JSON")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the durations")
    options = parser.parse_args()
    seconds = {role: options.scale * time for role, time in options.seconds.items()}
    found = []
    for strategy, streaming in itertools.product(options.strategies, (False, True)[: 1 + options.streaming]):
        placement = {"strategy": strategy, "streaming": streaming, "pools": options.pools or {}}
        with tempfile.TemporaryDirectory() as folder:
            line = measure(
                Path(folder, "run"), strategy + ", streaming" * streaming, placement,
                devices=options.devices, iterations=options.iterations, seconds=seconds,
            )  # fmt: skip
        print(
            f"{line.strategy:<23} wall {line.wall:6.1f} s, planned {line.planned:6.1f} s, "
            f"shortest {line.shortest:6.1f} s, overlap {line.overlap:.1%}, alone {line.alone:6.1f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        found.append(line)
    same = all(line.digests == found[0].digests for line in found)
    print(json.dumps({"same_digests": same, "runs": [{**asdict(line), "digests": None} for line in found]}))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
