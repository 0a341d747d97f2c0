"""`pipeline attach|logs|cancel RUN`: a run from any node, by what is on the disk and in the cluster's queue."""

import os
import time
from pathlib import Path

from rich.console import Console

from contracts.artifacts import MANIFEST
from contracts.errors import UserError
from pipelines.attempts import StageFailedError, tail
from pipelines.graph import Graph
from pipelines.report import print_table
from pipelines.rundir import CANCEL, RunDirectory
from pipelines.slurm import scheduler
from pipelines.status import jobs_for, queued_jobs, state_of
from pipelines.supervisor import failure_of, log_of, parts_of

SECONDS = 5.0


def attach(console: Console, run: RunDirectory, graph: Graph) -> None:
    """Tell what the stages do until the run is over; interrupted, it leaves them alone.

    Raises:
        StageFailedError: it ended without having published everything.
    """
    told: dict[str, tuple[str, ...]] = {}
    while True:
        jobs, holder = queued_jobs(run, graph), run.holder()
        for node in graph.nodes.values():
            state = state_of(run, node, graph, driven=holder is not None, queued=jobs)
            if told.get(node.name, ("waiting",))[0] != state[0]:
                console.print(f"{state[0]:<12} {node.name}  {state[3]}", soft_wrap=True, markup=False, highlight=False)
            told[node.name] = state
        if not jobs and holder is None:
            break
        time.sleep(SECONDS)
    missing = [name for name, node in graph.nodes.items() if not (node.output / MANIFEST).is_file()]
    print_table(console, graph)
    if missing:
        failed = [name for name in missing if told[name][0] == "failed"]
        reason = "; ".join(f"{name}: {told[name][3]}" for name in failed) or "nobody works on it any more"
        raise StageFailedError(
            f"{run.path} is not finished: {len(missing)} of {len(graph.nodes)} stages are not published. {reason}\n  "
            "`pipeline status` shows all of them; `pipeline run` continues.",
            1,
        )


def print_logs(console: Console, run: RunDirectory, graph: Graph, stage: str | None, lines: int) -> None:
    """The last lines of a stage's logs; by default of those stages that run or have failed.

    Raises:
        UserError: there is no such stage, or it has no log yet.
    """
    if stage is not None and stage not in graph.nodes:
        raise UserError(f"the run {run.path} has no stage {stage!r}. `pipeline status {run.path}` lists them.")
    jobs, holder = queued_jobs(run, graph), run.holder()
    shown = 0
    for node in graph.nodes.values():
        attempts = run.attempts(node.name)
        if not attempts or (stage is not None and node.name != stage):
            continue
        if stage is None:
            state = state_of(run, node, graph, driven=holder is not None, queued=jobs)[0]
            if state not in ("running", "failed", "retrying", "interrupted"):
                continue
        parts = parts_of(attempts[-1])
        if stage is None and failure_of(attempts[-1]) is not None:
            parts = [log_of(attempts[-1]).parent]
        for log in [path for part in parts for path in (part / "stage.log", *sorted(part.glob("*_log.out")))]:
            if log.exists() and log.stat().st_size:
                shown += 1
                console.print(f"==> {log} <==", soft_wrap=True, markup=False, highlight=False)
                console.print(tail(log, lines), soft_wrap=True, markup=False, highlight=False)
    if not shown:
        what = f"stage {stage} has" if stage else "no stage runs or has failed; those that are published have"
        hint = "no log yet" if stage else "their logs below logs/. Name one: `pipeline logs RUN STAGE`"
        raise UserError(f"{what} {hint}.")


def cancel(console: Console, run: RunDirectory, graph: Graph) -> None:
    """End what works on a run: its jobs, and its driver wherever that is. What is finished stays."""
    jobs, holder = queued_jobs(run, graph), run.holder()
    if not jobs and holder is None:
        console.print(f"nobody works on {run.path}; nothing to cancel.", soft_wrap=True, highlight=False)
        return
    if holder is not None:
        (run.path / CANCEL).touch()
        console.print(f"asked {holder} to end.", soft_wrap=True, highlight=False)
    ids = list(dict.fromkeys(job.base for job in jobs))
    scheduler.cancel(ids)
    stages = [node.name for node in graph.nodes.values() if jobs_for(run, node, jobs)]
    if ids:
        run.record("cancelled", jobs=ids, by=os.environ.get("USER", str(os.getuid())))
        console.print(f"cancelled {len(ids)} Slurm jobs of {len(stages)} stages: {', '.join(ids)}.", soft_wrap=True)
    console.print(f"`pipeline run` with the same config continues {_shown(run.path)}.", soft_wrap=True, highlight=False)


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
