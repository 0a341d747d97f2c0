"""`pipeline attach|logs|cancel RUN`: follows and ends a run from any machine, through its files and its executors."""

import os
import time
from pathlib import Path

from rich.console import Console

from contracts.errors import UserError
from contracts.manifest import MANIFEST
from pipelines.execution.attempts import StageFailedError
from pipelines.execution.endings import failure_of, log_of, parts_of, tail
from pipelines.execution.executors.base import Executors, Site
from pipelines.graph import Graph
from pipelines.insight.status import RunActivity, states
from pipelines.insight.tables import print_table
from pipelines.run.directory import CANCEL, RunDirectory
from pipelines.run.events import RunCancelled
from pipelines.text import echo, plural, relative_path

POLL_SECONDS = 5.0
FOLLOW_SECONDS = 1.0
SHOWN_STATES = ("running", "failed", "retrying", "interrupted")
"""States of the stages whose logs are shown by default."""


def attach(console: Console, run: RunDirectory, graph: Graph) -> None:
    """Print every change of a stage's state until the run is over. An interrupt ends the output, not the run.

    Raises:
        StageFailedError: the run ended without having published everything.
    """
    shown: dict[str, tuple[str, ...]] = {}
    while True:
        activity = RunActivity.observe(run, graph).require_known()
        for name, state in states(run, graph, activity).items():
            if shown.get(name, ("waiting",))[0] != state[0]:
                console.print(f"{state[0]:<12} {name}  {state[3]}", soft_wrap=True, markup=False, highlight=False)
            shown[name] = state
        if activity.idle:
            break
        time.sleep(POLL_SECONDS)
    missing = [name for name, node in graph.nodes.items() if not (node.output / MANIFEST).is_file()]
    print_table(console, graph)
    if missing:
        failed = [name for name in missing if shown[name][0] == "failed"]
        reason = "; ".join(f"{name}: {shown[name][3]}" for name in failed) or "nobody works on it any more"
        raise StageFailedError(
            f"{run.path} is not finished: {len(missing)} of {len(graph.nodes)} stages are not published. {reason}\n  "
            "`pipeline status` shows all of them; `pipeline run` continues.",
            1,
        )


def print_logs(
    console: Console, run: RunDirectory, graph: Graph, stage: str | None, lines: int, part: str | None = None
) -> list[Path]:
    """Print the last lines of a stage's logs, by default of all stages that are running or have failed.

    Args:
        part: the job or machine whose log to print, for a stage with several.

    Returns:
        The paths of the logs.

    Raises:
        UserError: there is no such stage or part, or it has no log yet.
    """
    if stage is not None and stage not in graph.nodes:
        raise UserError(f"the run {run.path} has no stage {stage!r}. `pipeline status {run.path}` lists them.")
    logs = _logs(run, graph, stage)
    if part is not None:
        known = [log.parent.name for log in logs]
        logs = [log for log in logs if log.parent.name == part]
        if not logs:
            raise UserError(f"there is no log of a part {part!r}. Known: {', '.join(known) or 'none'}.")
    if not logs:
        what = f"stage {stage} has no log: it was not started yet" if stage else "no stage runs, has failed or stopped"
        raise UserError(f"{what}. `pipeline logs {run.path} STAGE` shows the log of any stage that was started.")
    for log in logs:
        echo(console, f"==> {log} <==", tail(log, lines) or "(nothing yet)")
        if traces := [*log.parent.glob("traces/*.gz")]:
            echo(console, f"==> {plural(len(traces), 'profiler trace')} in {log.parent / 'traces'} <==")
    return logs


def _logs(run: RunDirectory, graph: Graph, stage: str | None) -> list[Path]:
    now = states(run, graph, RunActivity.observe(run, graph))
    executors = list(Executors(Site(run, graph, run.config)).outliving_drivers())
    chosen = [stage] if stage else [name for name, state in now.items() if state[0] in SHOWN_STATES]
    logs: list[Path] = []
    for name in chosen:
        attempts = run.attempts(name)
        parts = parts_of(attempts[-1]) if attempts else []
        if stage is None and attempts and failure_of(attempts[-1]) is not None:
            parts = [log_of(attempts[-1]).parent]
        own = [part / "stage.log" for part in parts if (part / "stage.log").exists()]
        logs += own or [log for executor in executors for log in (executor.logs(attempts[-1]) if attempts else [])]
    return logs


def follow_logs(console: Console, run: RunDirectory, graph: Graph, stage: str | None, logs: list[Path]) -> None:
    """Print what is appended to the logs, and to those of stages that start later, until nobody works on the run."""
    read = {log: log.stat().st_size for log in logs if log.exists()}
    last: Path | None = logs[-1]
    over = False
    while not over:
        over = RunActivity.observe(run, graph).idle or (
            stage is not None and (graph.nodes[stage].output / MANIFEST).is_file()
        )
        for log in dict.fromkeys([*read, *_logs(run, graph, stage)]):
            with log.open("rb") as file:
                file.seek(read.get(log, 0))
                new = file.read()
            whole = new if over else new[: new.rfind(b"\n") + 1]
            read[log] = read.get(log, 0) + len(whole)
            if whole:
                echo(console, *([f"==> {log} <=="] if log != last else []), whole.decode(errors="replace").rstrip("\n"))
                last = log
        if not over:
            time.sleep(FOLLOW_SECONDS)


def cancel(console: Console, run: RunDirectory, graph: Graph) -> None:
    """End the jobs of a run, and its driver on whatever machine it is. Published artifacts stay."""
    activity = RunActivity.observe(run, graph).require_known()
    if activity.idle:
        console.print(f"nobody works on {run.path}; nothing to cancel.", soft_wrap=True, highlight=False)
        return
    with run.submit_lock():  # from now on, a job that ends submits no further ones
        (run.path / CANCEL).touch()
        ids = [
            id for executor in Executors(Site(run, graph, run.config)).outliving_drivers() for id in executor.cancel()
        ]
    if activity.holder is not None:
        console.print(f"asked {activity.holder} to end.", soft_wrap=True, highlight=False)
    if ids:
        run.record(RunCancelled(jobs=ids, by=os.environ.get("USER", str(os.getuid()))))
        console.print(f"cancelled {plural(len(ids), 'job')}: {', '.join(ids)}.", soft_wrap=True, highlight=False)
    console.print(
        f"`pipeline run` with the same config continues {relative_path(run.path)}.", soft_wrap=True, highlight=False
    )
