"""Submits detached runs, which have no driver: all jobs at once, each with dependencies on those that it needs.

No process stays behind. A stage's first job decides as a driver would whether the stage can be reused (`prepare`). Its
last job records what was published, or retries the stage (`finalize`): it submits the next attempt and moves the
dependencies of later jobs to it. If no retry is possible it fails, and Slurm cancels the jobs that depend on it. The
last job of a gate that rolls the run back acts like the submitting command: it replaces the jobs of later iterations,
which now start from another policy. All of this happens under one file lock and relies only on files.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.config import Role, read_yaml, validate
from contracts.errors import RunStoppedError, TransientError, UserError
from contracts.files import exists_uncached
from contracts.locks import locked
from contracts.manifest import MANIFEST
from pipelines.execution.attempts import STAGE_CONFIG, decision_of, write_decision
from pipelines.execution.endings import ending_of, log_of, log_tail
from pipelines.execution.executors.base import JobEntry, Site
from pipelines.execution.executors.slurm import scheduler
from pipelines.execution.executors.slurm.events import job_events, record_missed
from pipelines.execution.executors.slurm.jobs import (
    RECORD,
    Jobs,
    cancel_unrecorded,
    clear_folders,
    copy_output,
    jobs_of,
    last_jobs,
    submit,
    write_job_request,
)
from pipelines.execution.executors.slurm.scheduler import SchedulerError
from pipelines.execution.executors.slurm.task import FAILED, RETRIED, SlurmTask
from pipelines.execution.lifecycle import Lifecycle
from pipelines.execution.listeners import Broadcast
from pipelines.execution.supervisor import end_orphans
from pipelines.graph import Node
from pipelines.planning.placement import placed_graph
from pipelines.run.decisions import Decision
from pipelines.run.directory import CANCEL, RunDirectory
from pipelines.run.events import RunEnded, RunStarted, StageSubmitted
from pipelines.run.gates import decision_after
from pipelines.run.superseded import finish_deletions
from pipelines.run.verdicts import Verdict, verdicts
from pipelines.text import echo, plural

if TYPE_CHECKING:
    from rich.console import Console

REBUILD_MARK = "again"
"""File that marks an attempt that rebuilds deleted weights; it holds the reason."""
RETRY_MARK = "continues"
"""File that marks an attempt that a finishing job has submitted, as a retry."""


def detach(console: "Console", site: Site, plan: dict[str, Verdict]) -> None:
    """Submit all stages that have to run, and print how to follow them."""
    run, graph = site.run, site.graph
    if not scheduler.queue(run.path):
        end_orphans(run.path)
        finish_deletions(run.path)
        run.clear_scratch()
    to_run = [name for name, verdict in plan.items() if not verdict.reuse]
    new = submit_all(site, plan)
    for name, jobs in new.items():
        echo(console, f"submit {name}  (job {', '.join(jobs.ids)}; {plan[name].reason})")
    if not to_run:
        echo(console, f"{run.path} is finished: all {len(graph.nodes)} stages are published; nothing to do.")
        run.record(RunEnded(outcome="finished"))
        return
    count = plural(sum(len(jobs.ids) for jobs in new.values()), "job")
    under_way = plural(len(to_run) - len(new), "stage")
    also = f"; {under_way} under way already" if len(to_run) > len(new) else ""
    echo(
        console,
        f"{len(new)} of {len(graph.nodes)} stages submitted as {count}{also}. No process stays here. "
        f"Follow it with `pipeline status {run.path}`, `attach`, `logs` or `cancel`.",
    )


def submit_all(site: Site, plan: dict[str, Verdict]) -> dict[str, Jobs]:
    """Submit the stages that have to run and have no jobs yet. Returns the new jobs by stage, in order."""
    run, graph = site.run, site.graph
    with run.submit_lock():
        live = cancel_unrecorded(run.path)
        record_missed(run, live)
        run.record(RunStarted(stages=len(graph.nodes), by="Slurm"))
        return submit_missing(site, plan, live)


def submit_missing(site: Site, plan: dict[str, Verdict], live: set[str]) -> dict[str, Jobs]:
    """`submit_all` for a caller that holds the submit lock. If killed at any instant, another call does the rest.

    Jobs that are outdated or depend on outdated ones are cancelled first; their replacements wait until they have
    ended.

    Args:
        live: the ids of the run's jobs that have not ended.
    """
    run, graph = site.run, site.graph
    lifecycle = Lifecycle(run, graph, site.config)
    new: dict[str, Jobs] = {}
    cancel_strays(site, live)
    for node in graph.nodes.values():
        if plan[node.name].reuse:
            if not (node.output / MANIFEST).is_file():  # it is in superseded/
                lifecycle.act(node, lifecycle.decide(node))
            continue
        after_end: list[str] = []
        known = last_jobs(run, node.name)
        if known is not None and known.last in live:
            if is_current(node, run.attempts(node.name)[-1]) and not new.keys() & set(node.needs):
                continue
            scheduler.cancel(known.ids)
            after_end = [id for id in known.ids if id in live]
        attempt = run.new_attempt(node.name)
        write_job_request(node, attempt, site)
        if plan[node.name].rebuild:
            (attempt / REBUILD_MARK).write_text(plan[node.name].reason)
        after = predecessors(run, node, live)
        try:
            new[node.name] = submit(node, attempt, site, detached=True, after=after, after_end=after_end)
        except SchedulerError as error:
            scheduler.cancel([id for jobs in new.values() for id in jobs.ids])
            cancel_unrecorded(run.path)
            raise SchedulerError(
                f"{error}. The jobs submitted before were cancelled; fix the cause and run the command again."
            ) from error
        live |= set(new[node.name].ids)
        run.record(StageSubmitted(stage=node.name, attempt=attempt.name, jobs=new[node.name].ids))
    return new


def cancel_strays(site: Site, live: set[str]) -> None:
    """End the jobs of stages that are no longer in the graph."""
    run = site.run
    attempts = [path.parent for path in (run.path / "logs").rglob(RECORD)]
    strays = [jobs_of(attempt) for attempt in attempts if run.stage_of(attempt) not in site.graph.nodes]
    scheduler.cancel(sorted({id for jobs in strays if jobs is not None for id in jobs.ids} & live))


def is_current(node: Node, attempt: Path) -> bool:
    """Whether an attempt's config is that of the stage in the present graph."""
    path = attempt / STAGE_CONFIG
    try:
        asked = validate(node.stage.config, read_yaml(path), str(path))
    except UserError:  # made for another stage of this name, or deleted or damaged
        return False
    return all(asked.select(role) == node.config.select(role) for role in (Role.IDENTITY, Role.INPUT))


def predecessors(run: RunDirectory, node: Node, live: set[str]) -> tuple[str, ...]:
    """The unfinished last jobs of the stages that a node needs, as dependencies for its own."""
    found = [jobs.last for name in node.needs if (jobs := last_jobs(run, name)) is not None]
    return tuple(dict.fromkeys(id for id in found if id in live))


# Inside jobs.


@dataclass(frozen=True)
class JobContext:
    """The run, stage and attempt that a job of a detached run works on."""

    site: Site
    lifecycle: Lifecycle
    node: Node
    attempt: Path

    @classmethod
    def of(cls, task: SlurmTask, entry: JobEntry) -> "JobContext":
        """Load it from disk."""
        run = RunDirectory(Path(task.run))
        config = run.config
        graph = placed_graph(config, run.iterations)
        site = Site(run, graph, config, entry)
        return cls(site, Lifecycle(run, graph, config), graph.nodes[task.stage], Path(task.attempt))


def prepare(task: SlurmTask, entry: JobEntry) -> Decision:
    """Decide about a stage whose inputs are published, once for all tasks of its array and all their restarts."""
    attempt = Path(task.attempt)
    with locked(attempt / "prepare.lock"):
        decision = decision_of(attempt)
        if decision is None:
            decision = _prepare(JobContext.of(task, entry))
            write_decision(attempt, decision)
    return decision


def _prepare(context: JobContext) -> Decision:
    node, graph = context.node, context.site.graph
    if graph.rollbacks and not is_current(node, context.attempt):
        raise TransientError(f"stage {node.name} was submitted before a gate rolled the run back, and is outdated.")
    missing = [name for name in node.needs if not exists_uncached(graph.nodes[name].output / MANIFEST)]
    if missing:
        raise UserError(f"stage {node.name} was started, but {', '.join(missing)} is not published.")
    mark = context.attempt / REBUILD_MARK
    decision = context.lifecycle.decide(node, mark.read_text() if mark.exists() else None)
    context.lifecycle.act(node, decision)
    if not decision.reuse:
        context.lifecycle.start(node, decision, context.attempt)
    return decision


def finalize(task: SlurmTask, entry: JobEntry) -> int:
    """Record a stage's output after its jobs have ended, retry the stage, or fail.

    Returns:
        The exit code (task.py), by which Slurm starts or cancels the jobs that depend on this one.
    """
    context = JobContext.of(task, entry)
    run, graph, node, attempt = context.site.run, context.site.graph, context.node, context.attempt
    broadcast = Broadcast(run, entry.listeners(run, graph))
    with run.submit_lock():  # the submitting command may still be recording the job ids
        jobs = jobs_of(attempt)
    if jobs is None:
        print(f"{run.path}: the command that submitted this job was killed. Run it again.", file=sys.stderr)
        return FAILED
    published = exists_uncached(node.output / MANIFEST)
    for event in job_events(node.name, attempt, jobs.tasks, published=published):
        run.record(event)
        print(event.text)
    copy_output(attempt, run.path)
    decision = decision_of(attempt)
    with run.submit_lock():
        code = _retry(context) if decision is None or not published else _published(context, decision)
        clear_folders(run.path, scheduler.live_ids(run.path))
    if code == 0 and context.lifecycle.affects_retention(node):
        _retain(context)
    complete = all((other.output / MANIFEST).is_file() for other in graph.nodes.values())
    if code == RunStoppedError.exit_code:
        run.record(RunEnded(outcome="stopped"))
    elif complete or code not in (0, RETRIED):
        run.record(RunEnded(outcome="finished" if complete else "failed"))
    broadcast.close()
    return code


def _published(context: JobContext, decision: Decision) -> int:
    if not decision.reuse:
        context.lifecycle.finalize(context.node, decision.key, context.attempt)
    decided = decision_after(context.node)
    if decided is None:
        return 0
    if decided.action == "stop":
        print(f"stopped: {decided.reason}", file=sys.stderr)
        return RunStoppedError.exit_code
    site = context.site
    continues = not (site.run.path / CANCEL).exists()
    if continues and any(gate.do == "rollback" for gate in site.config.gates.values()):
        submit_missing(site, verdicts(site.graph, site.config, []), cancel_unrecorded(site.run.path))
    return 0


def _retain(context: JobContext) -> None:
    """Apply retention; only one job of the run does so at a time."""
    graph, retention = context.site.graph, context.lifecycle.retention
    published = {name for name, node in graph.nodes.items() if (node.output / MANIFEST).is_file()}
    with locked(context.site.run.path / "retention.lock"), retention:
        context.lifecycle.retain(context.node, published)
        while retention.poll():
            time.sleep(1)


def _retry(context: JobContext) -> int:
    """Retry the stage in another job that its dependents then wait for, or fail if a retry cannot help."""
    run, node, attempt = context.site.run, context.node, context.attempt
    if (run.path / CANCEL).exists():
        print(f"stage {node.name}: the run was cancelled", file=sys.stderr)
        return FAILED
    for earlier in attempts_since_command(run, node.name):
        if earlier != attempt:
            context.lifecycle.retries.pause_after(node.name, ending_of(earlier).kind)
    ending, pause = context.lifecycle.fail(node, attempt)
    if pause is None:
        text = ending.reason or f"{ending.how}\n{log_tail(attempt)}"
        print(f"error: stage {node.name}: {text}\n  log: {log_of(attempt)}", file=sys.stderr)
        return UserError.exit_code if ending.kind == "user" else FAILED
    print(f"stage {node.name} {ending.how} Retrying in {pause:.0f} s.")
    latest = run.attempts(node.name)[-1]
    if latest == attempt or jobs_of(latest) is None:  # otherwise this job was killed after submitting, and restarted
        next_attempt = run.new_attempt(node.name)
        (next_attempt / RETRY_MARK).touch()
        write_job_request(node, next_attempt, context.site)
        jobs = submit(node, next_attempt, context.site, detached=True, pause=pause)
        run.record(StageSubmitted(stage=node.name, attempt=next_attempt.name, jobs=jobs.ids))
    queue = scheduler.queue(run.path)
    live, pending = {job.base for job in queue}, {job.base for job in queue if job.state == "PENDING"}
    for later in context.site.graph.nodes.values():
        waiting = last_jobs(run, later.name)
        if node.name not in later.needs or waiting is None or waiting.work not in pending:
            continue
        success = f"afterok:{':'.join(predecessors(run, later, live))}"
        scheduler.set_dependency(waiting.work, success)
        if waiting.finish is not None:
            scheduler.set_dependency(waiting.finish, f"afterany:{waiting.work},{success}")
    return RETRIED


def attempts_since_command(run: RunDirectory, stage: str) -> list[Path]:
    """The attempts at a stage since the last command."""
    attempts = run.attempts(stage)
    first = max((number for number, path in enumerate(attempts) if not (path / RETRY_MARK).exists()), default=0)
    return attempts[first:]
