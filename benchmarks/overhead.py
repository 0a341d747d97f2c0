"""Measures the cost of watching and publishing a run: wandb offline, trackio, a hook, reports, and pushes to the Hub.

    .venv/bin/python benchmarks/overhead.py
    .venv/bin/python benchmarks/overhead.py --iterations 1 seed=1     # any keys of the config

Runs the quickstart with all of these, with a local double of the Hub, and prints the CPU seconds of each, as the kernel
counts them when a process ends (benchmarks/accounted.py). For comparison it also measures the libraries alone, in short
scripts that do the same. The last line is one JSON object. The exit code is 1 if something was not reported, sent or
pushed, because the figures are meaningless then.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/pipelines")]  # before this folder, whose training.py is not the package

from hub_double import HubDouble  # noqa: E402

from benchmarks.accounted import Parts, parts_of  # noqa: E402
from contracts.points import METRICS  # noqa: E402
from pipelines.environments.locked import TRACKING, interpreter  # noqa: E402
from pipelines.run.directory import RunDirectory  # noqa: E402
from pipelines.run.events import HubPushed  # noqa: E402
from tracking.task import sent_file  # noqa: E402

HOOK = """
def record(happening, run):
    with (run.parent / "happenings.txt").open("a") as file:
        print(happening["kind"], happening.get("what", ""), file=file)
"""
WANDB = """
import wandb
wandb.Run._detect_and_apply_job_inputs = lambda run: None
off = ("disable_code", "disable_git", "silent", "x_disable_machine_info", "x_disable_meta", "x_disable_stats")
settings = wandb.Settings(console="off", x_save_requirements=False, **dict.fromkeys(off, True))
run = wandb.init(mode="offline", dir=".", settings=settings)
for point in points:
    run.log(point)
run.finish()
wandb.teardown()
"""
TRACKIO = """
import os
os.environ["TRACKIO_DIR"] = "."
import trackio
run = trackio.init(project="alone", embed=False, auto_log_gpu=False, auto_log_cpu=False)
for point in points:
    run.log(point)
run.finish()
"""
LIBRARY_SCRIPTS = {
    "wandb": (TRACKING, WANDB),
    "trackio": (TRACKING, TRACKIO),
    "huggingface_hub, not sending": ("driver", "from huggingface_hub import HfApi, CommitOperationAdd"),
    "pyarrow, not writing": ("annotation", "import pyarrow.parquet"),
    "jinja2, not rendering": ("driver", "import jinja2"),
}
"""Scripts with the libraries' own part of the work, and the environment of each. `points` are the run's metrics."""
TRACKERS = ("wandb", "trackio")
REPOS = ("model", "pairs", "rollouts")
KINDS = ("run", "stage", "iteration", "step", "shard")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs/quickstart.yaml"), help="by default the quickstart")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, HubDouble() as hub:
        parts, missing = measure(Path(folder), hub, options)
        alone = {name: script_seconds(Path(folder), *how) for name, how in LIBRARY_SCRIPTS.items()}
    for name, seconds in parts.watching.items():
        print(f"{name:<34} {seconds:8.2f} s")
    print(f"{'watching and publishing':<34} {parts.watched:8.2f} s, {100 * parts.share:.2f} % of all")
    print(f"{'all':<34} {parts.all:8.2f} s")
    for name, seconds in alone.items():
        print(f"{name + ' alone':<34} {seconds:8.2f} s")
    print(f"{'the libraries alone':<34} {sum(alone.values()):8.2f} s, {100 * sum(alone.values()) / parts.all:.2f} %")
    for text in missing:
        print(f"missing: {text}", file=sys.stderr)
    figures = {"cpu_seconds": parts.all, "watching": parts.watching, "share": parts.share, "alone": alone}
    print(json.dumps({**figures, "lacking": missing, "iterations": options.iterations}))
    return 1 if missing else 0


def measure(folder: Path, hub: HubDouble, options: argparse.Namespace) -> tuple[Parts, list[str]]:
    """Run the quickstart. Returns the CPU seconds of its parts, and what is missing of its results."""
    (folder / "hook.py").write_text(HOOK)
    record = folder / "record.json"
    command = [sys.executable, str(ROOT / "benchmarks/accounted.py"), str(record), "run", options.config]
    command += ["--iters", str(options.iterations), "--plain", "--quiet", f"directory={folder}", "name=watched"]
    command += ["tracking.wandb.mode=offline", f"tracking.trackio.directory={folder}/trackio"]
    command += [f"hooks.recorder.function={folder}/hook.py:record", f"hooks.recorder.kinds=[{','.join(KINDS)}]"]
    command += [f"hub.{name}=alice/{name}" for name in REPOS]
    subprocess.run([*command, *options.overrides], env={**os.environ, **hub.variables}, check=True)
    return parts_of(json.loads(record.read_text())), missing_results(folder / "watched", options.iterations)


def script_seconds(folder: Path, environment: str, code: str) -> float:
    """The CPU seconds of a script, including processes that it starts and waits for."""
    python = sys.executable if environment == "driver" else str(interpreter(environment, "cpu"))
    read = (
        f"import json; points = [json.loads(line)['metrics'] for line in open({str(folder / 'watched' / METRICS)!r})]"
    )
    place = folder / "alone"
    place.mkdir(exist_ok=True)
    process = subprocess.Popen([python, "-c", f"{read}\n{code}"], cwd=place, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{code} has failed")
    return used.ru_utime + used.ru_stime


def missing_results(run: Path, iterations: int) -> list[str]:
    """The results that are missing of a watched run."""
    there = (run / METRICS).stat().st_size
    found = [f"metrics in {name}" for name in TRACKERS if int(sent_file(run, name).read_text()) != there]
    happenings = (run.parent / "happenings.txt").read_text().splitlines()
    found += [f"a hook's {kind}" for kind in KINDS if not any(line.split()[0] == kind for line in happenings)]
    found += [] if happenings[-1] == "run finished" else ["the end of the run, for the hook"]
    pushed = {(event.repo, event.what) for event in RunDirectory(run).events() if isinstance(event, HubPushed)}
    wanted = {("alice/model", "report")}
    wanted |= {(f"alice/{repo}", f"iteration-{number + 1}") for repo in REPOS for number in range(iterations)}
    return [*found, *(f"{what} of {repo} on the Hub" for repo, what in sorted(wanted - pushed))]


if __name__ == "__main__":
    sys.exit(main())
