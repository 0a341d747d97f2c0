"""`pipeline status RUN`: shows the progress of a run, from its files and from what its executors know of their jobs."""

import io
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.files import write_atomically
from contracts.fingerprint import RELEASED
from contracts.manifest import MANIFEST
from pipelines.config.run import RunConfig
from pipelines.execution.endings import failure_of, fraction_done, latest_metrics, log_of, progress_of
from pipelines.execution.executors.base import Executors, Observation, Site
from pipelines.graph import Graph, Node
from pipelines.insight.event_text import metrics_in_words, notable_lines, of_current_config, place_in_words
from pipelines.insight.remaining_time import RemainingTime
from pipelines.insight.tables import print_table
from pipelines.planning.cluster import cluster_of
from pipelines.planning.placement import placed_if_possible
from pipelines.planning.scheduling import streams
from pipelines.run.decisions import has_current_inputs
from pipelines.run.directory import CANCEL, RunDirectory
from pipelines.run.events import Event, StagePublished, StageStarted
from pipelines.run.gates import refused, stop_decision
from pipelines.run.metrics import best_of, evaluations

State = tuple[str, str, str, str]
"""State, rows, seconds and detail of a stage."""
STATUS_PATIENCE_SECONDS = 10.0
"""Seconds for which `status` retries a scheduler that does not answer."""
PATIENCE_SECONDS = 60.0
"""Seconds for which other commands retry it."""


@dataclass(frozen=True)
class RunActivity:
    """The driver and the jobs that are working on a run at one moment."""

    holder: str | None
    """The process that holds the run's lock, the driver; None if there is none."""
    observed: list[Observation]
    """The observations of those executors whose jobs outlive the driver."""

    @classmethod
    def observe(cls, run: RunDirectory, graph: Graph, patience: float = PATIENCE_SECONDS) -> "RunActivity":
        """Observe a run now, retrying schedulers that do not answer for `patience` seconds."""
        holder = run.holder()
        lasting = Executors(Site(run, graph, run.config)).outliving_drivers()
        return cls(holder, [seen for executor in lasting if (seen := executor.observe(patience)) is not None])

    def require_known(self) -> "RunActivity":
        """Return self; raise UserError if a scheduler has not answered."""
        if self.errors:
            raise UserError(self.errors[0])
        return self

    @property
    def errors(self) -> list[str]:
        """The errors of executors that could not be observed."""
        return [seen.error for seen in self.observed if seen.error is not None]

    @property
    def jobs(self) -> int:
        """Number of jobs that have not ended."""
        return sum(seen.jobs for seen in self.observed)

    @property
    def idle(self) -> bool:
        """Whether nobody works on the run; false as well where an executor could not be observed."""
        return self.holder is None and not self.jobs and not self.errors

    def works_on(self, stage: str) -> bool:
        """Whether a job of a stage has not ended."""
        return any(seen.works_on(stage) for seen in self.observed)

    def submitted(self, stage: str) -> bool:
        """Whether the latest attempt at a stage was handed to a scheduler."""
        return any(seen.submitted(stage) for seen in self.observed)

    def state(self, stage: str, progress: str | None) -> tuple[str, str] | None:
        """State and detail of a stage that has jobs; None for other stages."""
        return next((state for seen in self.observed if (state := seen.state(stage, progress)) is not None), None)

    def ended_before_start(self, stage: str) -> tuple[str, str] | None:
        """State and detail of a stage whose jobs have ended before it started; None for other stages."""
        return next((state for seen in self.observed if (state := seen.ended_before_start(stage)) is not None), None)


def jobs_elsewhere(run: RunDirectory, graph: Graph) -> int:
    """The number of a run's jobs that have not ended.

    Raises:
        UserError: a scheduler does not answer, so that it is not known.
    """
    return RunActivity.observe(run, graph).require_known().jobs


def print_status(console: Console, run: RunDirectory, graph: Graph) -> None:
    """Print who works on a run, then its report."""
    activity = RunActivity.observe(run, graph, STATUS_PATIENCE_SECONDS)
    for error in activity.errors:
        console.print(f"The jobs on the cluster are not known: {error}", soft_wrap=True, highlight=False)
    pinned = ", pinned" if run.pinned else ""
    if activity.holder:
        driver = f"driven by {activity.holder}"
    elif activity.errors:
        driver = "no driver, and perhaps jobs on a cluster"
    else:
        driver = f"under way as {activity.jobs} jobs" if activity.jobs else "nobody drives it"
    console.print(f"{run.path}: {driver}{pinned}", soft_wrap=True, highlight=False)
    print_report(console, run, graph, activity)


def status_data(run: RunDirectory, graph: Graph) -> dict[str, Any]:
    """The data of `print_status`, for --json."""
    activity = RunActivity.observe(run, graph, STATUS_PATIENCE_SECONDS)
    cluster = cluster_of(run.config)
    placed = placed_if_possible(graph, cluster)
    remaining = RemainingTime(placed, cluster, streams(placed, run.config))
    remaining.update(run.events())
    found = states(run, graph, activity)
    given = {event.stage: event for event in run.events() if isinstance(event, StageStarted)}
    shares = {name: fraction_done(run.attempts(name)[-1]) for name in remaining.started if run.attempts(name)}
    published = [name for name, state in found.items() if state[0] in ("published", "released")]
    rows, stop = evaluations(graph), stop_decision(graph)
    took = {event.stage: event.seconds for event in run.events() if isinstance(event, StagePublished)}
    return {
        "run": str(run.path),
        "driver": activity.holder,
        "jobs": activity.jobs,
        "pinned": run.pinned,
        "errors": activity.errors,
        "remaining_seconds": None if activity.idle else remaining.seconds(shares, published),
        "stages": [
            {
                "stage": name,
                "state": state,
                "rows": int(rows) if rows else None,
                "detail": detail,
                "pool": given[name].pool if name in given else "",
                "devices": given[name].devices if name in given else None,
                "seconds": took.get(name),
                "expected_seconds": expected_seconds(run.config, graph.nodes[name]) if name in graph.nodes else None,
            }
            for name, (state, rows, _, detail) in found.items()
        ],
        "happened": notable_lines(of_current_config(run.events(), run.config)),
        "stopped": None if stop is None else stop.reason,
        "evaluations": [{**metrics, "policy": str(policy)} for policy, metrics in rows],
        "best": best_of(rows, refused(graph))[1]["iteration"] if rows else None,
    }


def expected_seconds(config: RunConfig, node: Node) -> float | None:
    """The duration of a stage that the run's plan expects; None where it has no expectation."""
    expectation = config.placement.expectation
    role = expectation.stages.get(node.role) if expectation is not None else None
    return role.seconds_of(node.iteration) if role is not None else None


def print_report(console: Console, run: RunDirectory, graph: Graph, activity: RunActivity) -> None:
    """Print every stage with its state, the failures, notable events, then the metrics so far."""
    events = run.events()
    given = {event.stage: place_in_words(event) for event in events if isinstance(event, StageStarted)}
    table = Table("stage", "state", "rows", "seconds", "detail")
    failures: list[str] = []
    for name, state in states(run, graph, activity).items():
        if state[0] == "failed":
            failures.append(f"FAILED {name}: {state[3]}")
            state = (*state[:3], "why: below")
        detail = ", ".join(filter(None, (state[3], given.get(name, "") if state[0] == "running" else "")))
        table.add_row(name, *(escape(text) for text in (*state[:3], detail)))
    console.print(table)
    unrecorded: list[Event] = []
    try:
        unrecorded += [event for seen in activity.observed if seen.error is None for event in seen.unrecorded_events()]
    except UserError as error:
        failures.append(f"The history of some jobs is not known: {error}")
    for line in [*failures, *notable_lines([*of_current_config(events, run.config), *unrecorded])]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    print_table(console, graph)


def save_report(run: RunDirectory, graph: Graph) -> None:
    """Write the report to report.txt in the run's directory."""
    console = Console(file=io.StringIO(), width=200)
    activity = RunActivity(None, RunActivity.observe(run, graph).observed)
    print_report(console, run, graph, activity)
    write_atomically(run.path / "report.txt", console.file.getvalue().encode())  # type: ignore[attr-defined]


def states(run: RunDirectory, graph: Graph, activity: RunActivity) -> dict[str, State]:
    """The state of each stage. A stage is blocked if one that it needs has failed, is blocked, or was interrupted as a
    scheduler's job that nothing continues."""
    found: dict[str, State] = {}
    lost: set[str] = set()
    goes_on = activity.holder is not None or (run.path / CANCEL).exists()
    for node in graph.nodes.values():
        state = state_of(run, node, graph, activity)
        cause = [name for name in node.needs if name in lost]
        if cause and state[0] in ("waiting", "interrupted") and not activity.works_on(node.name):
            state = ("blocked", "", "", f"by {', '.join(cause)}")
        stopped = state[0] == "interrupted" and not goes_on and activity.submitted(node.name)
        if stopped or state[0] in ("failed", "blocked"):
            lost.add(node.name)
        found[node.name] = state
    return found


def state_of(run: RunDirectory, node: Node, graph: Graph, activity: RunActivity) -> State:
    """State, rows, seconds and detail of a stage."""
    if (node.output / MANIFEST).is_file():
        return _state_of_published(node, graph)
    attempts = run.attempts(node.name)
    if not attempts:
        return "waiting", "", "", ""
    last = attempts[-1]
    progress = progress_of(last)
    if (with_jobs := activity.state(node.name, progress)) is not None:
        return _short(*with_jobs)
    failure, driven, cancelled = failure_of(last), activity.holder is not None, (run.path / CANCEL).exists()
    if failure is not None and failure["kind"] != "stopped" and not (cancelled and failure["kind"] == "transient"):
        state = "retrying" if driven and failure["kind"] == "transient" else "failed"
        return _short(state, f"{failure['text'].strip().splitlines()[-1]} (log: {log_of(last)})")
    if (ended := activity.ended_before_start(node.name)) is not None:
        return _short("waiting", "") if driven or activity.jobs or cancelled else _short(*ended)
    stopped = (last / "exit.json").exists() or not driven
    metrics = "" if stopped else metrics_in_words(latest_metrics(last))
    return _short("interrupted" if stopped else "running", ", ".join(filter(None, [progress, metrics])))


def _short(state: str, detail: str) -> State:
    return state, "", "", detail


def _state_of_published(node: Node, graph: Graph) -> State:
    try:
        manifest = Artifact.open(node.output).manifest
        current = has_current_inputs(node, graph, manifest)
    except UserError as error:
        return _short("damaged", str(error))
    state = "outdated"
    if current:
        state = "released" if (node.output / RELEASED).is_file() else "published"
    return state, str(manifest.rows), f"{manifest.seconds.get('total', 0):.1f}", str(manifest.ledger)
