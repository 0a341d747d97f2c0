"""A run without a driver: all of its stages' jobs are submitted at once, each waiting for those that it needs.

No process stays behind. Before a stage works, its first job decides, as a driver would, whether it can be reused
(`prepare`). After it, its last job takes note of what it has published, or has it tried again (`conclude`): it submits
the next attempt, and makes those who wait for this one wait for that. Where nothing can be tried again it fails, and
Slurm cancels whatever waits for it. All of this is done under one file lock, and from what is on the disk.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from contracts.errors import UserError
from contracts.files import appears
from contracts.fingerprint import RELEASED
from contracts.manifest import MANIFEST
from pipelines.config.run import RunConfig
from pipelines.environments.launch import probe_versions
from pipelines.execution.attempts import Retries, decision_of, last_words, require_room, settle, write_decision
from pipelines.execution.slurm import scheduler
from pipelines.execution.slurm.events import events_of, in_words, record_missed
from pipelines.execution.slurm.executor import request_for
from pipelines.execution.slurm.jobs import (
    Jobs,
    clear_folders,
    end_unknown,
    jobs_of,
    keep_last_words,
    last_jobs,
    submit,
    unfinished_jobs,
)
from pipelines.execution.slurm.node import FAILED, TRY_AGAIN, Task
from pipelines.execution.slurm.resources import resources_of
from pipelines.execution.slurm.scheduler import SchedulerError
from pipelines.execution.supervisor import end_orphans, ending_of, log_of
from pipelines.graph import Graph, Node
from pipelines.insight.status import save_report
from pipelines.iteration import build_graph
from pipelines.run.decisions import Decision, decide, make_room
from pipelines.run.directory import CANCEL, RunDirectory, locked
from pipelines.run.metrics import write_metrics
from pipelines.run.retention import Retention, drop_aside, may_be_released, restore, set_aside
from pipelines.run.verdicts import Verdict, verdicts
from pipelines.text import plural

AGAIN = "again"
"""Mark of an attempt that makes weights again that were deleted."""
CONTINUES = "continues"
"""Mark of an attempt that a finishing job has submitted."""


def require_no_chain(run: RunDirectory, graph: Graph, config: RunConfig, *, same: bool) -> None:
    """Check that no chain of jobs works on a run.

    Args:
        same: one with the same settings may, because that is what is asked for again.

    Raises:
        UserError: one does.
    """
    chained = {id for jobs in unfinished_jobs(run, graph).values() if jobs.chained for id in jobs.ids}
    ids = sorted(scheduler.live_ids(run.path) & chained, key=int) if chained else []
    if not ids or (same and run.config.settings() == config.settings()):
        return
    other = " with other settings" if same else ""
    raise UserError(
        f"the run {run.path} goes on without a driver{other}, as {plural(len(ids), 'Slurm job')} from {ids[0]} on. "
        f"`pipeline attach {run.path}` watches them; `pipeline cancel {run.path}` ends them, and what is done stays."
    )


def detach(console: Console, run: RunDirectory, graph: Graph, config: RunConfig) -> None:
    """Submit all that is to be done, and say how to follow it."""
    if not scheduler.queue(run.path):
        end_orphans(run.path)
        restore(run.path)
        run.clear_scratch()
    plan = verdicts(graph, config, [])
    to_run = [name for name, verdict in plan.items() if not verdict.reuse]
    new = submit_chain(run, graph, config, plan)
    for name, jobs in new.items():
        line = f"submit {name}  (job {', '.join(jobs.ids)}; {plan[name].reason})"
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if not to_run:
        console.print(f"{run.path} is finished: all {len(graph.nodes)} stages are published; nothing to do.")
        save_report(run, graph)
        return
    count = plural(sum(len(jobs.ids) for jobs in new.values()), "job")
    under_way = plural(len(to_run) - len(new), "stage")
    also = f"; {under_way} under way already" if len(to_run) > len(new) else ""
    console.print(
        f"{len(new)} of {len(graph.nodes)} stages submitted as {count}{also}. Nothing of it runs here. "
        f"Follow it with `pipeline status {run.path}`, `attach`, `logs` or `cancel`.",
        soft_wrap=True,
        highlight=False,
    )


def require_detachable(graph: Graph, config: RunConfig, plan: dict[str, Verdict]) -> None:
    """Raise UserError where a stage that is to run does so elsewhere than on Slurm."""
    for node in graph.nodes.values():
        where = resources_of(node, config.executor).executor
        if where != "slurm" and not plan[node.name].reuse:
            raise UserError(
                f"stage {node.name} runs on the executor {where}, which needs a process that stays: with --detach all "
                "stages run on Slurm. Set executor.stages so that it does too, or leave --detach out."
            )


def submit_chain(run: RunDirectory, graph: Graph, config: RunConfig, plan: dict[str, Verdict]) -> dict[str, Jobs]:
    """Submit every stage that is to run and has no jobs yet; returns the new jobs by stage, in order.

    Raises:
        UserError: a stage is to run elsewhere than on Slurm.
    """
    require_detachable(graph, config, plan)
    with run.submitting():
        live = end_unknown(run.path)
        record_missed(run, live)
        new: dict[str, Jobs] = {}
        for node in graph.nodes.values():
            if plan[node.name].reuse:
                if not (node.output / MANIFEST).is_file():  # it lies in superseded/
                    take_back(run, node, config)
                continue
            known = last_jobs(run, node.name)
            if known is not None and known.last in live:
                if not new.keys() & set(node.needs):
                    continue
                scheduler.cancel(known.ids)  # it waits for what has failed; Slurm has only not ended it yet
            attempt = run.new_attempt(node.name)
            request_for(node, attempt, run.path, config)
            if plan[node.name].again:
                (attempt / AGAIN).touch()
            try:
                new[node.name] = submit(
                    node, attempt, graph, config.executor, chained=True, after=predecessors(run, node, live)
                )
            except SchedulerError as error:
                scheduler.cancel([id for jobs in new.values() for id in jobs.ids])
                end_unknown(run.path)
                raise SchedulerError(
                    f"{error}. What this command had submitted before was cancelled; mend it and give it again."
                ) from error
            live |= set(new[node.name].ids)
            run.record("submitted", stage=node.name, attempt=attempt.name, jobs=new[node.name].ids)
    return new


def take_back(run: RunDirectory, node: Node, config: RunConfig) -> None:
    """Give a stage back what it had published under the same key before."""
    versions = probe_versions(config.environments.of(node.environment), node.environment)
    make_room(node, decide(node, versions, run.path), run.path)


def predecessors(run: RunDirectory, node: Node, live: set[str]) -> tuple[str, ...]:
    """The jobs that a stage has to wait for: the last ones of the stages that it needs, if they are under way."""
    found = [jobs.last for name in node.needs if (jobs := last_jobs(run, name)) is not None]
    return tuple(dict.fromkeys(id for id in found if id in live))


# On the nodes.


@dataclass(frozen=True)
class Place:
    """Where a job of a chain stands."""

    run: RunDirectory
    config: RunConfig
    graph: Graph
    node: Node
    attempt: Path

    @classmethod
    def of(cls, task: Task) -> "Place":
        """Read everything anew from the disk."""
        run = RunDirectory(Path(task.run))
        config = run.config
        graph = build_graph(config, run.iterations)
        return cls(run, config, graph, graph.nodes[task.stage], Path(task.attempt))


def prepare(task: Task) -> Decision:
    """Decide about a stage whose inputs are published, once for all tasks of its array and all their starts."""
    attempt = Path(task.attempt)
    with locked(attempt / "prepare.lock"):
        decision = decision_of(attempt)
        if decision is None:
            decision = _prepare(Place.of(task))
            write_decision(attempt, decision)
    return decision


def _prepare(place: Place) -> Decision:
    node, run = place.node, place.run
    missing = [name for name in node.needs if not appears(place.graph.nodes[name].output / MANIFEST)]
    if missing:
        raise UserError(f"stage {node.name} was started, but {', '.join(missing)} is not published.")
    versions = probe_versions(place.config.environments.of(node.environment), node.environment)
    decision = decide(node, versions, run.path)
    if (place.attempt / AGAIN).exists() and (node.output / RELEASED).is_file():
        decision = Decision(False, "its weights were deleted by gc and are needed", decision.key)
        set_aside(node.output)
    make_room(node, decision, run.path)
    if decision.reuse:
        run.record("reused", stage=node.name, reason=decision.reason, key=decision.key)
        return decision
    require_room(node, place.graph, place.config)
    run.record("started", stage=node.name, reason=decision.reason, key=decision.key, attempt=place.attempt.name)
    return decision


def conclude(task: Task) -> int:
    """After a stage's jobs: take note of what it has published, or have it tried again, or fail.

    Returns:
        The exit code (node.py), by which Slurm lets those go on that wait for it, or cancels them.
    """
    place = Place.of(task)
    run, node, attempt = place.run, place.node, place.attempt
    with run.submitting():  # who submitted this job notes its id meanwhile
        jobs = jobs_of(attempt)
    if jobs is None:
        print(f"{run.path}: the command that submitted this job was killed. Give it again.", file=sys.stderr)
        return FAILED
    published = appears(node.output / MANIFEST)
    for event in events_of(attempt, jobs.tasks, published=published):
        run.record("slurm", stage=node.name, **event)
        print(in_words(event))
    keep_last_words(attempt, run.path)
    decision = decision_of(attempt)
    with run.submitting():
        code = _again(place) if decision is None or not published else _published(place, decision)
        clear_folders(run.path, scheduler.live_ids(run.path))
    if code == 0 and (may_be_released(node) or node.stage.name == "evaluation"):
        _retain(place)
    if code not in (0, TRY_AGAIN) or all((other.output / MANIFEST).is_file() for other in place.graph.nodes.values()):
        save_report(run, place.graph)
    return code


def _published(place: Place, decision: Decision) -> int:
    if not decision.reuse:
        settle(place.run, place.graph, place.node, decision.key, place.attempt)
        if (place.attempt / AGAIN).exists() and not drop_aside(place.node.output, place.run.path):
            print(f"{place.node.name} differs from what it was before its weights were deleted")
    elif place.node.stage.name == "evaluation":
        write_metrics(place.run.path, place.graph)
    return 0


def _retain(place: Place) -> None:
    """Delete and compress what is not needed any more, one job of the run at a time."""
    published = {name for name, node in place.graph.nodes.items() if (node.output / MANIFEST).is_file()}
    with (
        locked(place.run.path / "retention.lock"),
        Retention(place.run, place.graph, place.config.retention, print) as retention,
    ):
        retention.apply(published)
        while retention.poll():
            time.sleep(1)


def _again(place: Place) -> int:
    """Try the stage again in another job, if that can help, with the dependents waiting for it; else fail."""
    run, node, config = place.run, place.node, place.config
    if (run.path / CANCEL).exists():
        print(f"stage {node.name}: the run was cancelled", file=sys.stderr)
        return FAILED
    ending = ending_of(place.attempt)
    retries = Retries(config.executor.retries, config.executor.backoff_seconds)
    pause = None
    for earlier in chain_attempts(run, node.name):
        pause = retries.pause_after(node.name, ending_of(earlier).kind)
    run.record("failed", stage=node.name, attempt=place.attempt.name, kind=ending.kind, how=ending.how, retry_in=pause)
    if pause is None:
        text = ending.reason or f"{ending.how}\n{last_words(place.attempt)}"
        print(f"error: stage {node.name}: {text}\n  log: {log_of(place.attempt)}", file=sys.stderr)
        return UserError.exit_code if ending.kind == "user" else FAILED
    print(f"stage {node.name} {ending.how} Once more in {pause:.0f} s.")
    latest = run.attempts(node.name)[-1]
    if latest == place.attempt or jobs_of(latest) is None:  # else this job was killed just after, and started again
        attempt = run.new_attempt(node.name)
        (attempt / CONTINUES).touch()
        request_for(node, attempt, run.path, config)
        jobs = submit(node, attempt, place.graph, config.executor, chained=True, pause=pause)
        run.record("submitted", stage=node.name, attempt=attempt.name, jobs=jobs.ids)
    queue = scheduler.queue(run.path)
    live, pending = {job.base for job in queue}, {job.base for job in queue if job.state == "PENDING"}
    for later in place.graph.nodes.values():
        waiting = last_jobs(run, later.name)
        if node.name not in later.needs or waiting is None or waiting.work not in pending:
            continue
        success = f"afterok:{':'.join(predecessors(run, later, live))}"
        scheduler.set_dependency(waiting.work, success)
        if waiting.finish is not None:
            scheduler.set_dependency(waiting.finish, f"afterany:{waiting.work},{success}")
    return TRY_AGAIN


def chain_attempts(run: RunDirectory, stage: str) -> list[Path]:
    """The attempts at a stage since a command was given last."""
    attempts = run.attempts(stage)
    first = max((number for number, path in enumerate(attempts) if not (path / CONTINUES).exists()), default=0)
    return attempts[first:]
