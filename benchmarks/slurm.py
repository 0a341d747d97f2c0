"""Measures the overhead of driver and Slurm for a stage with many small shards, and whether it is linear in them.

    .venv/bin/python benchmarks/slurm.py

Prints a table, and as its last line one JSON object. The method is described in benchmarks/README.md.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose training.py is not the package

from benchmarks import watch_shards  # noqa: E402

STAGE = "iteration-000/heldout/reward"
ROLLOUTS = "iteration-000/heldout/generation"
MODES = ("attached", "detached", "replicas")
"""attached: a job array under a driver. detached: the same without a driver. replicas: as many processes without
Slurm."""
PHASES = ("decide", "submit", "start", "load", "work", "end", "finish", "publish", "notice")
"""The parts of a stage's wall time, in order; README.md defines where each ends."""
LINES = ("overhead", "overhead_cpu", "sharing", "sharing_cpu")
"""The figures that are fitted by a straight line over the number of shards."""
DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "node1", "node2", "node3", "node4")
SITE = """
import sys
if sys.orig_argv[1:4] == ["-m", "annotation", "score"]:
    from benchmarks.watch_shards import watch
    watch()
"""
"""The sitecustomize.py on the stage's PYTHONPATH."""
MODEL = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
torch.manual_seed(0)
policy, output = sys.argv[1:]
AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1).save_pretrained(output)
AutoTokenizer.from_pretrained(policy).save_pretrained(output)
"""
"""A script that turns the toy task's policy into a reward model."""
SECONDS = 900


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = parse(arguments)
    if options.drive:
        print(json.dumps(drive(options.drive, json.loads(options.overrides), detached=options.detach)))
        return 0
    with tempfile.TemporaryDirectory(prefix="slurm-benchmark-") as scratch:
        os.environ |= {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "RATCHET_VARIANT": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        policy, model = make_models(Path(scratch))
        with cluster(Path(scratch, "cluster"), options.port):
            rows, digests = [], {}
            for repetition in range(options.repetitions):
                for count in options.shards:
                    bench = Bench(Path(scratch, f"{count}-{repetition}"), count, options.tasks, policy, model)
                    for mode in MODES[:1] + (tuple(options.others) if count in options.others_at else ()):
                        rows.append(bench.run(mode))
                        show(rows[-1])
                        require_same(digests, rows[-1])
            peer = one_job_per_shard(Path(scratch, "peer"), options.peer_jobs, options.tasks)
    report = summary(rows, peer, options)
    print_table(report)
    print(json.dumps(report))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shards", type=int, nargs="+", default=[125, 250, 500, 1000])
    add("--tasks", type=int, default=16, help="tasks of the job array, and number of replicas")
    add("--others", nargs="*", choices=MODES[1:], default=list(MODES[1:]), help="modes to measure besides attached")
    add("--others-at", type=int, nargs="*", help="numbers of shards for these modes; by default the largest")
    add("--repetitions", type=int, default=1)
    add("--peer-jobs", type=int, default=50, help="jobs of submitit's map_array")
    add("--port", type=int, default=46800, help="base port of the cluster that is started")
    add("--drive", type=Path, help=argparse.SUPPRESS)
    add("--overrides", default="[]", help=argparse.SUPPRESS)
    add("--detach", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.others_at = options.others_at or [max(options.shards)]
    return options


# Running stages.


def make_models(scratch: Path) -> tuple[Path, Path]:
    """Create the toy task's untrained policy, and a reward model of the same shape."""
    world = scratch / "world"
    sizes = [f"{name}=1" for name in ("demonstrations", "train", "preference", "heldout")]
    stage(["training", "-m", "embedded", "world", f"output={world}", *sizes])
    stage(["annotation", "-c", MODEL, str(world / "model"), str(scratch / "reward")])
    return world / "model", scratch / "reward"


def stage(command: list[str]) -> None:
    """Run `python ...` in the environment named by the first word."""
    from pipelines.environments.launch import EnvironmentConfig, launch_command

    argv, variables = launch_command(EnvironmentConfig(), command[0], command[1:])
    run_quietly(argv, {**os.environ, **variables})


def run_quietly(command: list[str], environment: dict[str, str]) -> str:
    """Run a command and return its output; raise RuntimeError with the end of its errors if it fails."""
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {result.returncode}\n{result.stderr[-3000:]}")
    return result.stdout


@contextmanager
def cluster(state: Path, port: int) -> Iterator[None]:
    """Start a Slurm cluster of four virtual nodes, which this process's children use."""
    script = ["bash", str(ROOT / "scripts" / "dev-slurm.sh")]
    environment = {**os.environ, "DEV_SLURM_STATE": str(state), "DEV_SLURM_PORT": str(port)}
    run_quietly([*script, "up"], environment)
    os.environ |= {"SLURM_CONF": f"{state}/etc/slurm.conf", "DEV_SLURM_STATE": str(state)}
    try:
        yield
    finally:
        run_quietly([*script, "down"], environment)


class Bench:
    """A run with published rollouts, one short prompt with one answer per shard, but without scores."""

    def __init__(self, folder: Path, count: int, tasks: int, policy: Path, model: Path) -> None:
        folder.mkdir()
        self.folder, self.count, self.tasks = folder, count, tasks
        self.config = folder / "bench.yaml"
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SITE)
        prompts = folder / "prompts.jsonl"
        lines = (json.dumps({"prompt": f"Write about item {number}."}) + "\n" for number in range(count))
        prompts.write_text("".join(lines))
        variables = {"PYTHONPATH": f"{folder / 'site'}:{ROOT}", watch_shards.FOLDER: str(folder / "watched")}
        config = {
            "name": "bench",
            "directory": str(folder / "runs"),
            "policy": str(policy),
            "prompts": {name: {"source": str(prompts)} for name in ("train", "heldout")},
            "scorers": {"reward": {"kind": "reward_model", "model": str(model)}},
            "generation": {"k": 2, "max_new_tokens": 8, "shard_size": 1, "engine": "transformers"},
            "environments": {"annotation": {"variables": variables}},
            "executor": {"kind": "slurm", "resources": {"tasks": tasks, "cpus": 1}},
        }
        self.config.write_text(json.dumps(config))
        self.run_path = folder / "runs" / "bench"
        (folder / "watched").mkdir()
        self._publish_inputs()

    def _publish_inputs(self) -> None:
        """Publish prompts and rollouts under the keys that the run's own stages would give them."""
        from contracts.artifacts import Artifact, model_fingerprint
        from contracts.ledger import Ledger
        from contracts.publication import Publication
        from contracts.records import ROLLOUTS as SCHEMA
        from contracts.records import Completion, Prompt, Rollout, Sampling
        from contracts.stage import key_parts, stage_key
        from pipelines.environments.launch import probe_versions
        from pipelines.run.directory import RunDirectory

        config, graph = load(self.config)
        RunDirectory(config.run_directory).claim(config, self.config, 0)  # claimed until this method returns
        node = graph.nodes["prompts/heldout"]
        keys = {name: getattr(node.config, name) for name in ("source", "output")}
        stage([node.environment, *node.argv, *(f"{name}={value}" for name, value in keys.items())])
        prompts = Artifact.open(node.output)
        node = graph.nodes[ROLLOUTS]
        parts = key_parts(node.config, probe_versions(config.environments.of(node.environment), node.environment))
        publication = Publication(node.output, SCHEMA, node.config.stage, stage_key(parts))
        node.output.parent.mkdir(parents=True, exist_ok=True)
        ledger, weights = Ledger("samples"), model_fingerprint(Path(config.policy))
        ledger.keep()
        answer = Completion(0, (5, 6, 7), "It is good.", "length", (-1.0,) * 3, 1, Sampling(1.0, 1.0, 0, 8))
        with mock.patch.object(os, "fsync"):  # not part of the measurement
            publication.begin()
            for number, prompt in enumerate(prompts.rows(Prompt)):
                row = Rollout(prompt.prompt_id, prompt.messages, (1, 2, 3), (answer,), weights, 0, "processed")
                publication.write_rows(f"shard-{number:05d}.jsonl", [row], ledger)
            publication.publish(
                key_parts=parts, inputs=parts["inputs"], input_paths={}, unit="samples", weights=weights,
                versions=parts["versions"], seconds={}, facts={},
            )  # fmt: skip

    def run(self, mode: str) -> dict[str, Any]:
        """Score the shards in a mode, without reusing earlier results, and return the measurements."""
        output, watched = self.run_path / STAGE, self.folder / "watched"
        for folder in (output, self.run_path / "logs", watched):
            shutil.rmtree(folder, ignore_errors=True)
        (self.run_path / "events.jsonl").unlink(missing_ok=True)
        watched.mkdir()
        overrides = ["executor.kind=local", f"scorers.reward.replicas={self.tasks}"] if mode == "replicas" else []
        command = [sys.executable, "-m", "benchmarks.slurm", "--drive", str(self.config)]
        command += ["--overrides", json.dumps(overrides), *(["--detach"] if mode == "detached" else [])]
        daemons = daemon_seconds()
        driver = json.loads(run_quietly(command, dict(os.environ)).splitlines()[-1])
        ended = wait_for_published(self.run_path)
        (attempt,) = (self.run_path / "logs" / STAGE).iterdir()
        jobs = None if mode == "replicas" else json.loads((attempt / "jobs.json").read_text())
        spent = job_seconds([jobs["work"], jobs["finish"]], self.tasks + 1) if jobs else None
        daemons = daemon_seconds() - daemons
        return {
            "mode": mode,
            "shards": self.count,
            **self._read(driver, ended, attempt, jobs),
            "driver_cpu_seconds": driver["cpu"],
            "commands_cpu_seconds": driver["commands_cpu"],
            "jobs_cpu_seconds": spent,
            "daemons_cpu_seconds": daemons,
        }

    def _read(self, driver: dict[str, Any], ended: float, attempt: Path, jobs: dict[str, Any] | None) -> dict[str, Any]:
        """The measurements of a finished run, from its files."""
        from contracts.artifacts import Artifact

        artifact = Artifact.open(self.run_path / STAGE)
        exits = {path.parent.name: json.loads(path.read_text()) for path in attempt.rglob("exit.json")}
        written = [shard.stat().st_mtime for shard in artifact.shards]
        watched = watch_shards.read(self.folder / "watched")
        marks = [driver["begin"], (attempt / "request.json").stat().st_mtime]
        if jobs:
            last = exits.pop("publisher")
            tasks_end = max(entry["ended"] for entry in exits.values())
            marks += [jobs["submitted"], min(entry["started"] for entry in exits.values()), min(written), max(written)]
            marks += [tasks_end, last["started"], last["ended"], ended]
        else:
            (only,) = exits.values()
            last_end = sorted(line["ended"] for line in watched)[-2]  # the last process is the one that publishes
            marks += [started(self.run_path), only["started"], min(written), max(written), last_end, last_end]
            marks += [only["ended"], ended]
        compute = artifact.manifest.seconds["compute"]
        wall = ended - driver["begin"]
        return {
            "wall_seconds": wall,
            "phases": {name: b - a for name, (a, b) in zip(PHASES, pairwise(marks), strict=True)},
            "compute_seconds": compute,
            "overhead_seconds": wall - compute / self.tasks,
            **shard_figures(watched),
            "digest": artifact.manifest.digest,
        }


def shard_figures(watched: list[dict[str, Any]]) -> dict[str, Any]:
    """The measurements of the processes' own clocks: total CPU seconds, and milliseconds per shard beyond its
    computation."""
    workers = [line for line in watched if line["loop"][0]]
    made = [name for line in workers for name in line["shards"]]
    if len(made) != len(set(made)):
        raise RuntimeError("a shard was made twice")

    def total(part: str, clock: int) -> float:
        return sum(float(line[part][clock]) for line in workers)

    each: dict[str, dict[str, float]] = {}
    for clock, name in enumerate(("seconds", "cpu")):
        commit = total("write", clock)
        following = total("loop", clock) - total("open", clock) - total("make", clock)
        each[name] = {"commit": 1e3 * commit / len(made), "next": 1e3 * following / len(made)}
    sharing = [total("loop", clock) - total("open", clock) - total("make", clock) + total("write", clock)
               for clock in (0, 1)]  # fmt: skip
    compute = total("make", 1) - total("write", 1)
    loading = sum(line["cpu"] for line in workers) - total("loop", 1) + total("open", 1)
    return {
        "beyond_ms": each,
        "sharing_seconds": sharing[0],
        "sharing_cpu_seconds": sharing[1],
        "workers": sum(bool(line["shards"]) for line in workers),
        "stage_cpu_seconds": sum(line["cpu"] for line in watched),
        "compute_cpu_seconds": compute,
        "load_cpu_seconds_per_task": loading / len(workers),
    }


def require_same(digests: dict[int, str], row: dict[str, Any]) -> None:
    """Raise RuntimeError if two modes have published different scores for the same stage."""
    if digests.setdefault(row["shards"], row["digest"]) != row["digest"]:
        raise RuntimeError(f"{row['mode']}, {row['shards']} shards: another digest than before")


def load(config: Path, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """A run's config, and its graph reduced to the measured stage and those that it needs."""
    from pipelines.config.load import load_run_config
    from pipelines.planning.placement import placed_graph

    loaded = load_run_config(config, list(overrides))
    graph = placed_graph(loaded, 0)
    for name in graph.nodes.keys() - {"prompts/heldout", ROLLOUTS, STAGE}:
        del graph.nodes[name]
    return loaded, graph


def drive(path: Path, overrides: list[str], *, detached: bool) -> dict[str, Any]:
    """Do the same as `pipeline run`, in this (separate) process. Returns the start time and CPU seconds."""
    from rich.console import Console

    from pipelines.execution.driver import Driver
    from pipelines.execution.executors.base import Executors, Site
    from pipelines.insight.display import Display
    from pipelines.job import ENTRY
    from pipelines.run.directory import RunDirectory
    from pipelines.run.verdicts import verdicts

    begin = time.time()
    config, graph = load(path, overrides)
    run = RunDirectory(config.run_directory)
    run.claim(config, path, 0)
    console = Console(file=sys.stderr)
    site = Site(run, graph, config, ENTRY)
    if detached:
        Executors(site).of_kind("slurm").detach(console, verdicts(graph, config, []))
    else:
        with Display(console, run, graph) as display:
            Driver(site, [display]).drive()
    own, commands = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"begin": begin, "cpu": own.ru_utime + own.ru_stime, "commands_cpu": commands.ru_utime + commands.ru_stime}


# Reading times from Slurm and the run directory.


def events(run: Path) -> list[dict[str, Any]]:
    """The events of a run."""
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def started(run: Path) -> float:
    """The time at which the driver had submitted the stage."""
    return next(float(event["time"]) for event in events(run) if event["event"] == "started")


def wait_for_published(run: Path) -> float:
    """Wait until the stage is published, and return the time of that event."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for event in events(run):
            if event["event"] == "published":
                return float(event["time"])
            if event["event"] == "failed":
                raise RuntimeError(f"the stage failed: {event}")
        time.sleep(0.2)
    raise RuntimeError(f"{run}: the stage was not published within {SECONDS} s")


def job_seconds(ids: list[str], count: int) -> float:
    """Wait until jobs have ended, and return their CPU seconds including those of their children.

    Args:
        count: the number of jobs, with each task of an array counted.
    """
    deadline = time.monotonic() + 60
    while True:
        table = run_quietly(
            ["sacct", "-n", "-P", "--format=JobID,State,TotalCPU", f"--jobs={','.join(ids)}"], dict(os.environ)
        )
        rows = [line.split("|") for line in table.splitlines()]
        jobs = [row for row in rows if "." not in row[0]]  # the others are job steps, which have the CPU times
        if len(jobs) == count and {state for _, state, _ in rows} == {"COMPLETED"}:
            return sum(cpu_time(spent) for name, _, spent in rows if "." in name)
        if time.monotonic() > deadline:
            raise RuntimeError(f"the jobs {', '.join(ids)} are not {count} that are completed: {rows}")
        time.sleep(0.5)


def cpu_time(text: str) -> float:
    """The seconds of a time in Slurm's format [DAYS-][HOURS:]MINUTES:SECONDS[.FRACTION]."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a time in Slurm's format")
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def daemon_seconds() -> float:
    """The CPU seconds that the cluster's daemons have used so far."""
    state = Path(os.environ["DEV_SLURM_STATE"], "pids")
    ticks = 0
    for name in DAEMONS:
        fields = Path(f"/proc/{(state / name).read_text().strip()}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def one_job_per_shard(folder: Path, count: int, tasks: int) -> dict[str, Any]:
    """Measure the alternative: submitit's map_array with empty jobs, at most `tasks` at a time."""
    from pipelines.execution.executors.slurm.resources import Resources, submitit_parameters
    from pipelines.execution.executors.slurm.scripts import make_executor

    resources = Resources("scoring", "slurm", tasks=tasks, minutes=30)
    parameters = submitit_parameters(resources, name="peer", comment="peer", grace_seconds=20)
    executor = make_executor(folder, parameters)
    daemons, begin = daemon_seconds(), time.time()
    jobs = executor.map_array(abs, range(count))
    submitted = time.time()
    results = [folder / f"{job.job_id}_0_result.pkl" for job in jobs]
    deadline = time.monotonic() + SECONDS
    while not all(path.exists() for path in results):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{count} jobs of submitit have not ended within {SECONDS} s")
        time.sleep(0.2)
    ends = sorted(path.stat().st_mtime for path in results)
    spent = job_seconds([jobs[0].job_id.partition("_")[0]], count)
    return {
        "jobs": count,
        "wall_seconds": ends[-1] - begin,
        "submit_seconds": submitted - begin,
        "seconds_per_job": (ends[-1] - ends[0]) / (count - 1),
        "jobs_cpu_seconds_per_job": spent / count,
        "daemons_cpu_seconds_per_job": (daemon_seconds() - daemons) / count,
    }


# Evaluating the measurements.


def fit(shards: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """The least squares line: ms per shard, seconds without shards, and the largest relative deviation."""
    slope, intercept = statistics.linear_regression(shards, values)
    off = max(abs(value / (intercept + slope * count) - 1) for count, value in zip(shards, values, strict=True))
    return {"ms_per_shard": 1e3 * slope, "seconds": intercept, "largest_deviation_percent": 100 * off}


def overhead_cpu(row: dict[str, Any]) -> float:
    """The CPU seconds of driver, commands (without Slurm, the stage is one of them) and jobs, minus the computation."""
    jobs = row["jobs_cpu_seconds"] or 0.0
    return float(jobs + row["commands_cpu_seconds"] + row["driver_cpu_seconds"] - row["compute_cpu_seconds"])


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every figure over repetitions of the same run."""
    first = rows[0]
    found: dict[str, Any] = {}
    for name, value in first.items():
        values = [row[name] for row in rows]
        if isinstance(value, dict):
            found[name] = medians(values)
        elif isinstance(value, float):
            found[name] = round(statistics.median(values), 4)
        else:
            found[name] = value
    return found


def summary(rows: list[dict[str, Any]], peer: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The report: medians, fitted lines, and ratios to the alternatives."""
    for row in rows:
        row["overhead_cpu_seconds"] = overhead_cpu(row)
    runs = []
    for mode in MODES:
        for count in options.shards:
            if same := [row for row in rows if (row["mode"], row["shards"]) == (mode, count)]:
                runs.append({**medians(same), "wall_range": [round(f(row["wall_seconds"] for row in same), 2)
                                                             for f in (min, max)]})  # fmt: skip
    report: dict[str, Any] = {"tasks": options.tasks, "repetitions": options.repetitions, "runs": runs, "lines": {}}
    for mode in MODES:
        of_mode = [run for run in runs if run["mode"] == mode]
        counts = [row["shards"] for row in of_mode]
        if len(counts) > 1:
            report["lines"][mode] = {name: fit(counts, [row[f"{name}_seconds"] for row in of_mode]) for name in LINES}
    report["one_job_per_shard"] = peer
    largest = {run["mode"]: run for run in runs if run["shards"] == max(options.shards)}
    report["ratios"] = {}
    if {"attached", "replicas"} <= largest.keys():
        ours, local = largest["attached"], largest["replicas"]
        report["ratios"]["attached_to_replicas"] = {
            name: round(ours[f"{name}_seconds"] / local[f"{name}_seconds"], 3) for name in ("wall", *LINES)
        }
    if "attached" in largest:
        ours = largest["attached"]
        shard = ours["overhead_cpu_seconds"] / ours["shards"]
        job = peer["jobs_cpu_seconds_per_job"]
        report["ratios"]["one_job_per_shard_to_attached"] = {
            "cpu_without_loading": round(job / shard, 3),
            "cpu_with_loading": round((job + ours["load_cpu_seconds_per_task"]) / shard, 3),
            "daemons_cpu": round(
                peer["daemons_cpu_seconds_per_job"] * ours["shards"] / max(ours["daemons_cpu_seconds"], 0.01), 3
            ),
        }
    return report


def show(row: dict[str, Any]) -> None:
    """Print a run as soon as it has ended."""
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phases"].items())
    print(f"{row['mode']}, {row['shards']} shards: {row['wall_seconds']:.1f} s ({phases})", flush=True)


COLUMNS = {
    "mode": lambda run: run["mode"],
    "shards": lambda run: str(run["shards"]),
    "wall s": lambda run: f"{run['wall_seconds']:.1f}",
    **{name: lambda run, name=name: f"{run['phases'][name]:.1f}" for name in PHASES},
    "compute s": lambda run: f"{run['compute_seconds']:.1f}",
    "commit ms": lambda run: f"{run['beyond_ms']['seconds']['commit']:.1f}",
    "next ms": lambda run: f"{run['beyond_ms']['seconds']['next']:.1f}",
    "commit cpu": lambda run: f"{run['beyond_ms']['cpu']['commit']:.2f}",
    "next cpu": lambda run: f"{run['beyond_ms']['cpu']['next']:.2f}",
    "overhead s": lambda run: f"{run['overhead_seconds']:.1f}",
    "overhead cpu": lambda run: f"{run['overhead_cpu_seconds']:.1f}",
    "driver cpu": lambda run: f"{run['driver_cpu_seconds']:.2f}",
    "daemons cpu": lambda run: f"{run['daemons_cpu_seconds']:.2f}",
}
"""The columns of the table of runs."""


def print_table(report: dict[str, Any]) -> None:
    """Print the table of runs in Markdown, then the fitted lines and the ratios."""
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for run in report["runs"]:
        print(f"| {' | '.join(column(run) for column in COLUMNS.values())} |")
    print()
    for mode, lines in report["lines"].items():
        for name, line in lines.items():
            print(
                f"{mode}, {name.replace('_', ' ')}: {line['ms_per_shard']:.1f} ms per shard + {line['seconds']:.1f} s; "
                f"largest deviation {line['largest_deviation_percent']:.1f} %"
            )
    print(f"one job per shard: {json.dumps(report['one_job_per_shard'])}")
    for name, ratio in report["ratios"].items():
        print(f"{name}: {json.dumps(ratio)}")


if __name__ == "__main__":
    sys.exit(main())
