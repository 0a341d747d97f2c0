"""Measures the error of stage durations that are predicted from another run.

    .venv/bin/python benchmarks/prediction.py --config quickstart --iters 2 --folder FOLDER
    .venv/bin/python benchmarks/prediction.py --runs FOLDER/known FOLDER/held-out

The first form executes both runs, one after the other and independently (nothing is reused, no profiles are read); if
interrupted, the same command continues. The second run is predicted from the first one alone.

Wall times include the load of other programs, so CPU times are predicted in the same way as well. Prints a table, and
as its last line one JSON object. The method is described in benchmarks/README.md.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from contracts.artifacts import Artifact  # noqa: E402
from pipelines.execution.profiling import profiles_of, threads_of  # noqa: E402
from pipelines.planning.cluster import cluster_of  # noqa: E402
from pipelines.planning.placement import placed_graph  # noqa: E402
from pipelines.planning.profiles.datasheets import device_here  # noqa: E402
from pipelines.planning.profiles.predict import ProfilePredictor  # noqa: E402
from pipelines.planning.profiles.rows import Profile  # noqa: E402
from pipelines.run.directory import RunDirectory  # noqa: E402

KNOWN, HELD_OUT = "known", "held-out"


@dataclass(frozen=True)
class Compared:
    """One stage of the held-out run, in seconds."""

    stage: str
    basis: str
    predicted: float
    measured: float
    stated_error: float
    predicted_cpu: float | None
    measured_cpu: float | None

    @property
    def error(self) -> float:
        """(measured - predicted) / predicted."""
        return self.measured / self.predicted - 1


def compared(known: RunDirectory, held_out: RunDirectory) -> list[Compared]:
    """Predict every stage of a run from another run."""
    rows = profiles_of(known)
    graph = placed_graph(held_out.config, held_out.iterations)
    wall, cpu = _predictor(rows, held_out), _predictor(map(cpu_only, rows), held_out)
    measured = {row.id: row for row in profiles_of(held_out)}
    found = []
    for name, node in graph.nodes.items():
        row = measured.get(Artifact.open(node.output).manifest.checksum[:32])
        prediction, own = wall.predict(node, graph), cpu.predict(node, graph)
        if row is None or prediction is None or own is None:
            continue
        timed = row.cpu is not None and all(other.cpu is not None for other in rows)
        found.append(
            Compared(
                name,
                prediction.basis,
                prediction.seconds,
                row.seconds,
                prediction.error,
                own.compute if timed else None,
                row.cpu if timed else None,
            )
        )
    return found


def _predictor(rows: Iterable[Profile], run: RunDirectory) -> ProfilePredictor:
    config = run.config
    parallel = cluster_of(config).parallel
    return ProfilePredictor(rows, device_here(), threads=lambda node: threads_of(node, config), parallel=parallel)


def cpu_only(row: Profile) -> Profile:
    """The same profile with its CPU seconds as the only duration."""
    return msgspec.structs.replace(row, start=0.0, load=0.0, compute=row.cpu or 0.0, handoff=0.0)


def summary(stages: Sequence[Compared]) -> dict[str, float | int | None]:
    """The errors of the predictions, for single stages and in total."""
    timed = [stage for stage in stages if stage.predicted_cpu and stage.measured_cpu]
    predicted, measured = [stage.predicted for stage in stages], [stage.measured for stage in stages]
    return {
        "stages": len(stages),
        "predicted_seconds": sum(predicted),
        "measured_seconds": sum(measured),
        "error_of_all": _whole(zip(predicted, measured, strict=True)),
        "median_error_of_a_stage": statistics.median(abs(stage.error) for stage in stages),
        "rank_correlation": rank_correlation(predicted, measured),
        "within_two_stated_errors": statistics.fmean(abs(stage.error) <= 2 * stage.stated_error for stage in stages),
        "cpu_error_of_all": _whole((stage.predicted_cpu or 0, stage.measured_cpu or 0) for stage in timed),
        "cpu_median_error_of_a_stage": statistics.median(
            abs((stage.measured_cpu or 0) / (stage.predicted_cpu or 1) - 1) for stage in timed
        )
        if timed
        else None,
        "cpu_rank_correlation": rank_correlation(
            [stage.predicted_cpu or 0 for stage in timed], [stage.measured_cpu or 0 for stage in timed]
        )
        if timed
        else None,
    }  # fmt: skip


def _whole(pairs: Iterable[tuple[float, float]]) -> float | None:
    predicted, measured = map(sum, zip(*pairs, strict=True)) if (pairs := list(pairs)) else (0.0, 0.0)
    return measured / predicted - 1 if predicted else None


def rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values get their mean rank."""
    first, second = _ranks(ours), _ranks(theirs)
    means = statistics.fmean(first), statistics.fmean(second)
    products = math.fsum((a - means[0]) * (b - means[1]) for a, b in zip(first, second, strict=True))
    spread = math.fsum((a - means[0]) ** 2 for a in first) * math.fsum((b - means[1]) ** 2 for b in second)
    return products / math.sqrt(spread) if spread else 1.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
            for value in values]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Execute the runs if requested, compare them, and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, nargs=2, metavar="RUN", help="the known and the held-out run")
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--iters", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-prediction"))
    options = parser.parse_args(argv)
    runs = options.runs or [options.folder / name for name in (KNOWN, HELD_OUT)]
    for run in () if options.runs else runs:
        command = [sys.executable, "-m", "pipelines", "run", options.config, f"--iters={options.iters}", "--quiet"]
        command += [f"directory={run.parent.absolute()}", f"name={run.name}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RATCHET_PROFILES": "off"}
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    stages = compared(*map(RunDirectory.existing, runs))
    for stage in stages:
        cpu = "" if stage.measured_cpu is None else f"   cpu {stage.predicted_cpu:6.2f} {stage.measured_cpu:6.2f}"
        print(f"{stage.stage:36} {stage.basis:9} {stage.predicted:7.2f} {stage.measured:7.2f} {stage.error:+7.0%}{cpu}")
    print(json.dumps({**summary(stages), "each": [asdict(stage) for stage in stages]}))


if __name__ == "__main__":
    main()
