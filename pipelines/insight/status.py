"""`pipeline status RUN`: how far a run is, from what is on the disk and, for jobs on a cluster, in its queue."""

import contextlib
import io
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.files import write_atomically
from contracts.fingerprint import RELEASED
from contracts.manifest import MANIFEST, Manifest
from pipelines.execution.slurm.events import ACCOUNTING_PATIENCE, in_words, missed
from pipelines.execution.slurm.jobs import job_logs, jobs_of, last_jobs, unfinished_jobs
from pipelines.execution.slurm.scheduler import PATIENCE, Queued, queue
from pipelines.execution.supervisor import failure_of, log_of, parts_of, progress_of
from pipelines.graph import Graph, Node, input_paths
from pipelines.insight.tables import print_table
from pipelines.run.directory import CANCEL, RunDirectory
from pipelines.text import plural

State = tuple[str, str, str, str]
"""State, rows, seconds and detail of a stage."""
GLANCE_SECONDS = 10.0
"""For how long `status` asks a cluster again that does not answer."""
HOPELESS = frozenset(
    "PartitionConfig PartitionNodeLimit PartitionTimeLimit BadConstraints InvalidAccount InvalidQOS".split()
)
"""Reasons of Slurm's for a job that can never start."""
WAITS = ("Dependency", "BeginTime", "DependencyNeverSatisfied")
"""Reasons of Slurm's for a job that waits for others, not for room."""


def print_status(console: Console, run: RunDirectory, graph: Graph) -> None:
    """Who works on a run, and what there is to report of it."""
    holder = run.holder()
    jobs: list[Queued] | None = None
    try:
        jobs = queued_jobs(run, graph, GLANCE_SECONDS)
    except UserError as error:
        console.print(f"What is queued on the cluster is not known: {error}", soft_wrap=True, highlight=False)
    pinned = ", pinned" if run.pinned else ""
    if holder:
        driver = f"driven by {holder}"
    elif jobs is None:
        driver = "no driver, and perhaps Slurm jobs"
    else:
        driver = f"under way as {len({job.base for job in jobs})} Slurm jobs" if jobs else "nobody drives it"
    console.print(f"{run.path}: {driver}{pinned}", soft_wrap=True, highlight=False)
    print_report(console, run, graph, jobs, driven=holder is not None, patience=GLANCE_SECONDS)


def print_report(
    console: Console, run: RunDirectory, graph: Graph, jobs: list[Queued] | None, *, driven: bool, patience: float
) -> None:
    """Every stage with its state, why some have failed, what happened on the way, then the metrics so far.

    Args:
        jobs: those that have not ended; None if nobody knows.
        patience: seconds for which an accounting that does not answer is asked again.
    """
    table = Table("stage", "state", "rows", "seconds", "detail")
    failures: list[str] = []
    for name, state in states(run, graph, jobs, driven=driven).items():
        if state[0] == "failed":
            failures.append(f"FAILED {name}: {state[3]}")
            state = (*state[:3], "why: below")
        table.add_row(name, *(escape(text) for text in state))
    console.print(table)
    unheard: list[dict[str, Any]] = []
    try:
        unheard = [] if jobs is None else missed(run, {job.base for job in jobs}, patience)
    except UserError as error:
        failures.append(f"What happened to some of the jobs on the way is not known: {error}")
    for line in [*failures, *event_lines(run.events() + unheard)]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    print_table(console, graph)


def states(run: RunDirectory, graph: Graph, jobs: list[Queued] | None, *, driven: bool) -> dict[str, State]:
    """The state of each stage; one that waits for another that is not under way and not done is blocked."""
    found: dict[str, State] = {}
    lost: set[str] = set()
    waits_for_jobs = not driven and not (run.path / CANCEL).exists()
    for node in graph.nodes.values():
        state = state_of(run, node, graph, driven=driven, queued=jobs)
        cause = [name for name in node.needs if name in lost]
        if cause and state[0] in ("waiting", "interrupted") and not jobs_for(run, node, jobs):
            state = ("blocked", "", "", f"by {', '.join(cause)}")
        stopped = state[0] == "interrupted" and waits_for_jobs and last_jobs(run, node.name) is not None
        if stopped or state[0] in ("failed", "blocked"):
            lost.add(node.name)
        found[node.name] = state
    return found


def save_report(run: RunDirectory, graph: Graph) -> None:
    """Keep it as report.txt in the run's directory."""
    console = Console(file=io.StringIO(), width=200)
    print_report(console, run, graph, queued_jobs(run, graph), driven=False, patience=ACCOUNTING_PATIENCE)
    write_atomically(run.path / "report.txt", console.file.getvalue().encode())  # type: ignore[attr-defined]


def event_lines(events: list[dict[str, Any]]) -> list[str]:
    """What happened on the way that a reader of the results should know: accidents, retries, requeues; in order."""
    explained = {str(event.get("job")) for event in events if event["event"] == "requeue"}
    cancelled = [event.get("jobs") for event in events if event["event"] == "cancelled"]
    by_command = {str(id) for ids in cancelled if isinstance(ids, list) for id in ids}
    lines: dict[str, None] = {}
    unread = 0
    for event in events:
        try:
            line = _event_line(event, explained, by_command)
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
        ):  # of another version of Ratchet, or somebody's own
            line, unread = None, unread + 1
        if line is not None:
            lines[line] = None
    left_out = f"{plural(unread, 'line')} of events.jsonl cannot be read and left out here; nothing depends on that."
    return sorted(lines) + ([left_out] if unread else [])


def _event_line(event: dict[str, Any], explained: set[str], by_command: set[str]) -> str | None:
    """One event in words; None for one that is of no interest afterwards.

    Args:
        explained: the jobs whose requeue is told by the job itself.
        by_command: the jobs that were cancelled by `pipeline cancel`.
    """
    when, stage = event.get("time"), event.get("stage")
    match event["event"]:
        case "slurm":
            if event["job"].partition("_")[0] in by_command and event["state"].startswith("CANCELLED"):
                return None
            if event["state"] == "REQUEUED" and event["job"] in explained:
                return None
            text = in_words(event)
            with contextlib.suppress(ValueError):  # one that has no end
                when = datetime.fromisoformat(event["end"]).timestamp()
        case "requeue":
            text = f"job {event['job']} on {event['host']}: saved what it had and was requeued ({event['reason']})"
        case "restart":
            text = f"job {event['job']} on {event['host']}: its process ended with exit code {event['code']}"
            text += ", and was started again"
        case "failed":
            again = event["retry_in"]
            then = "not tried again" if again is None else f"tried again after {again:.0f} s"
            text = f"{event['attempt']} {event['how']} {then[0].upper()}{then[1:]}."
        case "source changed":
            text = f"made by Ratchet's source {event['ran']}, which was {event['asked']} when it was asked for"
        case "cancelled":
            stage, text = "the run", f"cancelled by {event['by']} with `pipeline cancel`"
        case "foreign line":
            raise ValueError("foreign line")
        case _:
            return None
    return f"{time.strftime('%F %T', time.localtime(when))}  {stage}: {text}"


def queued_jobs(run: RunDirectory, graph: Graph, patience: float = PATIENCE) -> list[Queued]:
    """The run's jobs that have not ended on the cluster, which is not asked where there can be none."""
    return queue(run.path, patience) if unfinished_jobs(run, graph) else []


def jobs_for(run: RunDirectory, node: Node, queued: list[Queued] | None) -> list[Queued]:
    """Those of a stage's latest attempt."""
    jobs = last_jobs(run, node.name)
    return [job for job in queued or [] if jobs is not None and job.base in jobs.ids]


def state_of(run: RunDirectory, node: Node, graph: Graph, *, driven: bool, queued: list[Queued] | None) -> State:
    """State, rows, seconds and detail of a stage."""
    if (node.output / MANIFEST).is_file():
        try:
            manifest = Artifact.open(node.output).manifest
            current = reads_what_is_there(node, graph, manifest)
        except UserError as error:
            return "damaged", "", "", str(error)
        state = "outdated"
        if current:
            state = "released" if (node.output / RELEASED).is_file() else "published"
        return state, str(manifest.rows), f"{manifest.seconds.get('total', 0):.1f}", str(manifest.ledger)
    attempts = run.attempts(node.name)
    if not attempts:
        return "waiting", "", "", ""
    last = attempts[-1]
    if queued is None and (submitted := jobs_of(last)) is not None:
        return "unknown", "", "", "; ".join(filter(None, [progress_of(last), f"job {', '.join(submitted.ids)}"]))
    jobs = jobs_for(run, node, queued)
    if jobs:
        return _state_on_cluster(jobs, progress_of(last) or "")
    failure = failure_of(last)
    cancelled = (run.path / CANCEL).exists() and failure is not None and failure["kind"] == "transient"
    if failure is not None and failure["kind"] != "stopped" and not cancelled:
        state = "retrying" if driven and failure["kind"] == "transient" else "failed"
        return state, "", "", f"{failure['text'].strip().splitlines()[-1]} (log: {log_of(last)})"
    if (ended := jobs_of(last)) is not None and parts_of(last) == [last]:
        if driven or queued or (run.path / CANCEL).exists():
            return "waiting", "", "", ""
        text = f"Slurm job {', '.join(ended.ids)} ended before the stage began; `sacct -D -j {ended.work}` says how"
        said = _complaint(job_logs(last, run.path))
        return ("failed", "", "", f"{text}. {said}") if said else ("interrupted", "", "", text)
    if (last / "exit.json").exists() or not driven:
        return "interrupted", "", "", progress_of(last) or ""
    return "running", "", "", progress_of(last) or ""


def _complaint(logs: list[Path]) -> str | None:
    """What jobs have said of their failure themselves: the first line with an error, or the last; with the log."""
    for log in logs:
        if lines := [line for line in log.read_text(errors="replace").splitlines() if line.strip()]:
            return f"{next((line for line in lines if 'error' in line.lower()), lines[-1])} (log: {log})"
    return None


def _state_on_cluster(jobs: list[Queued], progress: str) -> State:
    running = [job for job in jobs if job.state != "PENDING"]
    if running:
        where = ", ".join(f"{job.id} on {job.nodes or 'no node yet'}" for job in running[:4])
        return "running", "", "", f"{progress}{'; ' if progress else ''}job {where}{', ...' if running[4:] else ''}"
    reasons = {job.reason for job in jobs}
    detail = f"job {', '.join(dict.fromkeys(job.base for job in jobs))}: {', '.join(sorted(reasons))}"
    if reasons & HOPELESS:
        detail += "; it will not start as it is: cancel, and ask for less"
    return ("waiting" if reasons <= set(WAITS) else "queued"), "", "", f"{progress}{'; ' if progress else ''}{detail}"


def reads_what_is_there(node: Node, graph: Graph, manifest: Manifest) -> bool:
    """Whether a published stage was made from what the stages before it have published now."""
    known = {digest for value in manifest.inputs.values() for digest in (value if isinstance(value, list) else [value])}
    outputs = {graph.nodes[name].output for name in node.needs}
    read = outputs.intersection(input_paths(node.config))  # not the single files of the embedded world
    return all((path / MANIFEST).is_file() and Artifact.open(path).manifest.digest in known for path in read)
