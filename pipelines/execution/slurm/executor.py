"""Slurm under a driver that watches: it submits a stage's jobs and sees when they have ended.

They outlive the driver. The next command takes up those that still go on.
"""

import time
from pathlib import Path

from contracts.files import appears
from contracts.manifest import MANIFEST
from pipelines.config.executor import ExecutorSection
from pipelines.config.run import RunConfig
from pipelines.execution.attempts import decision_of, write_request
from pipelines.execution.executors import Job
from pipelines.execution.slurm import scheduler
from pipelines.execution.slurm.events import events_of, record_missed
from pipelines.execution.slurm.jobs import (
    Jobs,
    clear_folders,
    end_unknown,
    jobs_of,
    keep_last_words,
    submit,
    unfinished_jobs,
)
from pipelines.execution.slurm.resources import resources_of
from pipelines.execution.supervisor import PUBLISHER
from pipelines.graph import Graph, Node
from pipelines.run.directory import RunDirectory

SHORTEST, LONGEST = 1.0, 20.0
"""Seconds between two questions to Slurm's controller."""
ORDINARY = frozenset("None Resources Priority Dependency BeginTime JobArrayTaskLimit Cleaning Prolog".split())
"""Reasons of a pending job that go away by themselves."""


class AttachedExecutor:
    """Submits the jobs of single stages."""

    kind = "slurm"

    def __init__(self, config: RunConfig, graph: Graph) -> None:
        self._config = config
        self._graph = graph
        self._queue = Queue(graph.directory, end_unknown(graph.directory))

    def submit(self, node: Node, attempt: Path, run: Path) -> Job:
        """Submit what works on the attempt."""
        request_for(node, attempt, run, self._config)
        jobs = submit(node, attempt, self._graph, self._config.executor)
        self._queue.expect(jobs)
        return AttachedJob(node, jobs, attempt, self._queue)

    def adopt(self, node: Node, key: str, run: RunDirectory) -> Job | None:
        """The latest attempt's jobs, if they have not ended. Those that make something else are cancelled."""
        attempts = run.attempts(node.name)
        jobs = jobs_of(attempts[-1]) if attempts else None
        if jobs is None or not self._queue.live.intersection(jobs.ids):
            return None
        decision = decision_of(attempts[-1])
        if decision is None or decision.key != key:
            scheduler.cancel(jobs.ids)
            return None
        return AttachedJob(node, jobs, attempts[-1], self._queue)


def request_for(node: Node, attempt: Path, run: Path, config: RunConfig) -> None:
    """Write the request of an attempt that runs on the cluster."""
    resources = resources_of(node, config.executor)
    threads = max(1, resources.cpus // resources.processes)
    write_request(node, attempt, run, config, threads, here=False)


def look_back(run: RunDirectory, graph: Graph, executor: ExecutorSection) -> None:
    """Before a driver starts: see to the jobs that earlier commands have left on the cluster.

    What happened to those that have ended is recorded. Those of stages that do not run there any more are cancelled;
    the others are taken up when their turn comes.
    """
    unfinished = unfinished_jobs(run, graph)
    if not unfinished:
        return
    live = scheduler.live_ids(run.path)
    record_missed(run, live)
    strays = {
        id
        for name, jobs in unfinished.items()
        if resources_of(graph.nodes[name], executor).executor != "slurm"
        for id in jobs.ids
    }
    scheduler.cancel(sorted(strays & live))


class Queue:
    """The run's jobs that have not ended: asked for often at first, and less often the longer nothing changes."""

    def __init__(self, run: Path, live: set[str]) -> None:
        self.run = run
        self._changed = self._asked = time.monotonic()
        self.live = live
        self.reasons: dict[str, str] = {}

    def expect(self, jobs: Jobs) -> None:
        """Jobs that were submitted just now."""
        self.live = self.live | set(jobs.ids)
        self._changed = self._asked = time.monotonic()

    def poll(self) -> None:
        """Ask again if it is time to."""
        now = time.monotonic()
        if now - self._asked < min(LONGEST, max(SHORTEST, (now - self._changed) / 10)):
            return
        jobs = scheduler.queue(self.run)
        live = {job.base for job in jobs}
        self.reasons = {job.base: job.reason for job in jobs if job.state == "PENDING"}
        self._asked = time.monotonic()
        if live != self.live:
            self._changed = self._asked
            self.live = live
            clear_folders(self.run, live)


class AttachedJob:
    """The jobs of one attempt."""

    def __init__(self, node: Node, jobs: Jobs, attempt: Path, queue: Queue) -> None:
        self._output = node.output
        self._jobs = jobs
        self._queue = queue
        self._told = ""
        self._said = attempt / (PUBLISHER if jobs.finish else "task-0") / "exit.json"

    def ended(self) -> bool:
        """By its last supervisor's word, or because Slurm has it no longer."""
        self._queue.poll()
        return self._said.exists() or self._jobs.last not in self._queue.live

    def news(self) -> str | None:
        """That Slurm does not start a job, for a reason that may last."""
        for id in self._jobs.ids:
            reason = self._queue.reasons.get(id, "None")
            if reason != self._told and reason not in ORDINARY:
                self._told = reason
                return f"job {id} waits: {reason}"
        return None

    def clear(self, attempt: Path) -> list[dict[str, str]]:
        """Keep what the jobs have printed where there is no other log."""
        keep_last_words(attempt, self._queue.run)
        return events_of(attempt, self._jobs.tasks, published=appears(self._output / MANIFEST))

    def cancel(self, attempt: Path) -> None:
        """End the jobs, wherever they are."""
        scheduler.cancel(self._jobs.ids)
