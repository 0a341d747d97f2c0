"""The executor for Slurm, for runs with a driver and for detached ones.

Jobs outlive the driver; the next command adopts those that have not ended.
"""

import time
from pathlib import Path

from rich.console import Console

from contracts.errors import UserError
from contracts.files import exists_uncached
from contracts.manifest import MANIFEST
from pipelines.execution.attempts import decision_of
from pipelines.execution.endings import PUBLISHER, parts_of
from pipelines.execution.executors.base import Executor, Job, Site
from pipelines.execution.executors.slurm import detached, scheduler
from pipelines.execution.executors.slurm.checks import check_slurm
from pipelines.execution.executors.slurm.events import job_events, missed_events, record_missed
from pipelines.execution.executors.slurm.jobs import (
    Jobs,
    cancel_unrecorded,
    clear_folders,
    copy_output,
    job_logs,
    jobs_of,
    last_jobs,
    submit,
    unfinished_jobs,
    write_job_request,
)
from pipelines.execution.executors.slurm.scripts import write_dry_run
from pipelines.graph import Node
from pipelines.run.directory import RunDirectory
from pipelines.run.events import JobEnded
from pipelines.run.verdicts import Verdict
from pipelines.text import plural

MIN_INTERVAL, MAX_INTERVAL = 1.0, 20.0
"""Bounds in seconds for the interval between queries of Slurm's controller."""
TEMPORARY_REASONS = frozenset("None Resources Priority Dependency BeginTime JobArrayTaskLimit Cleaning Prolog".split())
"""Reasons of pending jobs that pass on their own."""
PERMANENT_REASONS = frozenset(
    "PartitionConfig PartitionNodeLimit PartitionTimeLimit BadConstraints InvalidAccount InvalidQOS".split()
)
"""Reasons for which a job can never start."""
DEPENDENCY_REASONS = ("Dependency", "BeginTime", "DependencyNeverSatisfied")
"""Reasons of a job that waits for other jobs or a time, not for resources."""


class SlurmExecutor(Executor):
    """Submits the jobs of stages, and follows their state."""

    kind = "slurm"
    outlives_driver = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._watched: Queue | None = None

    @property
    def _queue(self) -> "Queue":
        if self._watched is None:
            self._watched = Queue(self.run.path, cancel_unrecorded(self.run.path))
        return self._watched

    def check(self) -> None:
        """Check that this machine belongs to a cluster that can satisfy the stages' requests."""
        check_slurm(self.config.executor, self.graph)

    def recover(self) -> None:
        """Record the events of ended jobs, and cancel jobs of stages that are now assigned to another executor.

        The other jobs are adopted when their stages are due.
        """
        unfinished = unfinished_jobs(self.run, self.graph)
        if not unfinished:
            return
        live = scheduler.live_ids(self.run.path)
        record_missed(self.run, live)
        strays = {
            id
            for name, jobs in unfinished.items()
            if self.entry(self.graph.nodes[name]).kind != self.kind
            for id in jobs.ids
        }
        scheduler.cancel(sorted(strays & live))

    def submit(self, node: Node, attempt: Path) -> Job:
        """Submit the jobs of an attempt."""
        write_job_request(node, attempt, self.site)
        jobs = submit(node, attempt, self.site)
        self._queue.expect(jobs)
        return AttachedJob(node, jobs, attempt, self._queue)

    def adopt(self, node: Node, key: str) -> Job | None:
        """The latest attempt's jobs, if they have not ended. Jobs under another key are cancelled."""
        attempts = self.run.attempts(node.name)
        jobs = jobs_of(attempts[-1]) if attempts else None
        if jobs is None or not self._queue.live.intersection(jobs.ids):
            return None
        decision = decision_of(attempts[-1])
        if decision is None or decision.key != key:
            scheduler.cancel(jobs.ids)
            return None
        return AttachedJob(node, jobs, attempts[-1], self._queue)

    def detach(self, console: Console, plan: dict[str, Verdict]) -> None:
        """Submit all stages at once, with dependencies between their jobs."""
        detached.detach(console, self.site, plan)

    def require_no_detached_run(self, *, same_settings: bool) -> None:
        """Check that no detached run's jobs are unfinished."""
        mine = {id for jobs in unfinished_jobs(self.run, self.graph).values() if jobs.detached for id in jobs.ids}
        ids = sorted(scheduler.live_ids(self.run.path) & mine, key=int) if mine else []
        if not ids or (same_settings and self.run.config.settings() == self.config.settings()):
            return
        path, other = self.run.path, " with other settings" if same_settings else ""
        raise UserError(
            f"the run {path} continues without a driver{other}, as {plural(len(ids), 'Slurm job')} from {ids[0]} on. "
            f"`pipeline attach {path}` watches them; `pipeline cancel {path}` ends them, and what is done stays."
        )

    def write_dry_run(self, console: Console, plan: dict[str, Verdict], *, detached: bool) -> None:
        """Write the batch scripts, and print the resources that they request."""
        runs = {name: verdict.reason for name, verdict in plan.items() if not verdict.reuse}
        write_dry_run(console, self.graph, self.config, runs, detached=detached)

    def observe(self, patience: float) -> "SlurmObservation":
        """The queue's state; the cluster is not asked if the run has no unfinished jobs."""
        queued, error = [], None
        try:
            if unfinished_jobs(self.run, self.graph):
                queued = scheduler.queue(self.run.path, patience)
        except UserError as found:
            error = str(found)
        return SlurmObservation(self.run, queued, error, patience)

    def logs(self, attempt: Path) -> list[Path]:
        """Files with the output of an attempt's jobs."""
        return job_logs(attempt, self.run.path)

    def cancel(self) -> list[str]:
        """End all jobs of the run. Returns their ids."""
        if not unfinished_jobs(self.run, self.graph):
            return []
        ids = sorted(scheduler.live_ids(self.run.path), key=int)
        scheduler.cancel(ids)
        return ids


class Queue:
    """The run's unfinished jobs, polled at intervals that grow while nothing changes."""

    def __init__(self, run: Path, live: set[str]) -> None:
        self.run = run
        self._changed = self._polled = time.monotonic()
        self.live = live
        self.reasons: dict[str, str] = {}

    def expect(self, jobs: Jobs) -> None:
        """Add jobs that were just submitted."""
        self.live = self.live | set(jobs.ids)
        self._changed = self._polled = time.monotonic()

    def poll(self) -> None:
        """Query the controller again if the interval is over."""
        now = time.monotonic()
        if now - self._polled < min(MAX_INTERVAL, max(MIN_INTERVAL, (now - self._changed) / 10)):
            return
        jobs = scheduler.queue(self.run)
        live = {job.base for job in jobs}
        self.reasons = {job.base: job.reason for job in jobs if job.state == "PENDING"}
        self._polled = time.monotonic()
        if live != self.live:
            self._changed = self._polled
            self.live = live
            clear_folders(self.run, live)


class AttachedJob:
    """The jobs of one attempt."""

    pid: int | None = None

    def __init__(self, node: Node, jobs: Jobs, attempt: Path, queue: Queue) -> None:
        self._node = node
        self._jobs = jobs
        self._attempt = attempt
        self._queue = queue
        self._last_reason = ""
        self._exit_file = attempt / (PUBLISHER if jobs.finish else "task-0") / "exit.json"

    def ended(self) -> bool:
        """Whether its last supervisor has written exit.json, or Slurm no longer lists its last job."""
        self._queue.poll()
        return self._exit_file.exists() or self._jobs.last not in self._queue.live

    def news(self) -> str | None:
        """The reason why Slurm does not start a job, if it may last."""
        for id in self._jobs.ids:
            reason = self._queue.reasons.get(id, "None")
            if reason != self._last_reason and reason not in TEMPORARY_REASONS:
                self._last_reason = reason
                return f"job {id} waits: {reason}"
        return None

    def clear(self) -> list[JobEnded]:
        """Keep the jobs' output in the attempt. Returns their events."""
        copy_output(self._attempt, self._queue.run)
        published = exists_uncached(self._node.output / MANIFEST)
        return job_events(self._node.name, self._attempt, self._jobs.tasks, published=published)

    def cancel(self) -> None:
        """End the jobs."""
        scheduler.cancel(self._jobs.ids)


class SlurmObservation:
    """A snapshot of a run's queued jobs, with the records of ended ones."""

    def __init__(self, run: RunDirectory, queued: list[scheduler.Queued], error: str | None, patience: float) -> None:
        self.error = error
        self._run = run
        self._queued = queued
        self._patience = patience

    @property
    def jobs(self) -> int:
        """Number of unfinished jobs; an array counts as one."""
        return len({job.base for job in self._queued})

    def works_on(self, stage: str) -> bool:
        """Whether one of the stage's latest jobs has not ended."""
        return bool(self._jobs_for(stage))

    def submitted(self, stage: str) -> bool:
        """Whether the latest attempt at a stage was submitted to Slurm."""
        return last_jobs(self._run, stage) is not None

    def _jobs_for(self, stage: str) -> list[scheduler.Queued]:
        jobs = last_jobs(self._run, stage)
        return [job for job in self._queued if jobs is not None and job.base in jobs.ids]

    def state(self, stage: str, progress: str | None) -> tuple[str, str] | None:
        """State and detail of a stage whose jobs are queued or running."""
        if self.error is not None:
            jobs = last_jobs(self._run, stage)
            parts = filter(None, [progress, f"job {', '.join(jobs.ids)}" if jobs else None])
            return ("unknown", "; ".join(parts)) if jobs else None
        queued = self._jobs_for(stage)
        if not queued:
            return None
        before = f"{progress}; " if progress else ""
        running = [job for job in queued if job.state != "PENDING"]
        if running:
            where = ", ".join(f"{job.id} on {job.nodes or 'no node yet'}" for job in running[:4])
            return "running", f"{before}job {where}{', ...' if running[4:] else ''}"
        reasons = {job.reason for job in queued}
        detail = f"job {', '.join(dict.fromkeys(job.base for job in queued))}: {', '.join(sorted(reasons))}"
        if reasons & PERMANENT_REASONS:
            detail += "; it will not start as it is: cancel, and ask for less"
        return "waiting" if reasons <= set(DEPENDENCY_REASONS) else "queued", f"{before}{detail}"

    def ended_before_start(self, stage: str) -> tuple[str, str] | None:
        """State and detail of a stage whose latest jobs ended before it began, with their error message."""
        attempts = self._run.attempts(stage)
        ended = jobs_of(attempts[-1]) if attempts else None
        if ended is None or parts_of(attempts[-1]) != [attempts[-1]]:
            return None
        text = f"Slurm job {', '.join(ended.ids)} ended before the stage began; `sacct -D -j {ended.work}` says how"
        for log in job_logs(attempts[-1], self._run.path):
            if lines := [line for line in log.read_text(errors="replace").splitlines() if line.strip()]:
                message = next((line for line in lines if "error" in line.lower()), lines[-1])
                return "failed", f"{text}. {message} (log: {log})"
        return "interrupted", text

    def unrecorded_events(self) -> list[JobEnded]:
        """Events of ended jobs that are not recorded yet."""
        return missed_events(self._run, {job.base for job in self._queued}, self._patience)
