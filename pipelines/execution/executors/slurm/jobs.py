"""Submits and records the jobs of one attempt at a stage. Their work on the nodes is in node.py.

    W   works: one supervisor per task of an array, or per node
    F   finishes, after W has ended in success or failure: publishes the output of an array's tasks; in a detached run
        it also finalizes (detached.py). Light stages of a detached run do all of this in a single job.

submitit stores a job as a pickle in a private folder outside of the run directory. A job that is requeued, by Slurm or
on its own request, starts again from that pickle; all other state is on disk.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec
import submitit

from contracts.attempt import ATTEMPT, ROLE
from contracts.files import write_atomically
from contracts.fingerprint import digest
from contracts.manifest import MANIFEST
from pipelines.execution.attempts import stage_request, write_request
from pipelines.execution.executors.base import Site
from pipelines.execution.executors.slurm import scheduler
from pipelines.execution.executors.slurm.resources import resources_of
from pipelines.execution.executors.slurm.scripts import PlannedJob, planned_jobs, slurm_folder
from pipelines.execution.executors.slurm.task import SlurmTask
from pipelines.graph import Graph, Node
from pipelines.run.directory import RunDirectory

RECORD = "jobs.json"


class Jobs(msgspec.Struct, frozen=True):
    """The jobs submitted for an attempt, stored as jobs.json in its folder."""

    work: str
    """W's id."""
    finish: str | None
    """F's id, if there is such a job."""
    detached: bool
    """Whether the jobs finalize the stage; otherwise a driver does."""
    array: int = 1
    """Number of W's tasks."""

    @property
    def ids(self) -> list[str]:
        """The jobs' ids, in the order in which they run."""
        return [self.work, *([self.finish] if self.finish else [])]

    @property
    def tasks(self) -> dict[str, int]:
        """Number of tasks by job id."""
        return {id: self.array if id == self.work else 1 for id in self.ids}

    @property
    def last(self) -> str:
        """The job whose end is the end of the attempt; later stages of a detached run depend on it."""
        return self.ids[-1]


def jobs_of(attempt: Path) -> Jobs | None:
    """The jobs of an attempt; None if none were submitted."""
    try:
        return msgspec.json.decode((attempt / RECORD).read_bytes(), type=Jobs)
    except (OSError, ValueError):  # none, or damaged: unrecorded jobs are cancelled and submitted again
        return None


def last_jobs(run: RunDirectory, stage: str) -> Jobs | None:
    """The jobs of the latest attempt at a stage."""
    attempts = run.attempts(stage)
    return jobs_of(attempts[-1]) if attempts else None


def unfinished_jobs(run: RunDirectory, graph: Graph) -> dict[str, Jobs]:
    """The latest jobs of stages that have published nothing; the jobs may have ended."""
    missing = [name for name, node in graph.nodes.items() if not (node.output / MANIFEST).is_file()]
    return {name: jobs for name in missing if (jobs := last_jobs(run, name)) is not None}


def cancel_unrecorded(run: Path) -> set[str]:
    """Cancel the run's jobs whose ids a killed command did not record.

    The caller holds the submit lock, so that no other process is submitting jobs of the run.

    Returns:
        The ids of the run's other jobs that have not ended.
    """
    attempts = [path.parent for path in (run / "logs").rglob(RECORD)]
    known = {id for attempt in attempts if (jobs := jobs_of(attempt)) for id in jobs.ids}
    live = scheduler.live_ids(run)
    scheduler.cancel(sorted(live - known))
    clear_folders(run, live & known)
    return live & known


def write_job_request(node: Node, attempt: Path, site: Site) -> None:
    """Write the request of an attempt that runs on the cluster."""
    resources = resources_of(node, site.config.executor)
    threads = max(1, resources.cpus // resources.processes)
    write_request(node, attempt, stage_request(node, attempt, site.run.path, site.config, threads, here=False))


def submit(
    node: Node,
    attempt: Path,
    site: Site,
    *,
    detached: bool = False,
    after: Collection[str] = (),
    after_end: Collection[str] = (),
    pause: float | None = None,
) -> Jobs:
    """Submit the jobs of an attempt whose request is written, and record their ids in its folder.

    Args:
        detached: whether the jobs finalize the stage themselves.
        after: jobs that must succeed before.
        after_end: jobs that must end before, in success or failure.
        pause: seconds to wait before the start.
    """
    success = [f"afterok:{':'.join(after)}"] if after else []
    ended = [f"afterany:{':'.join(after_end)}"] if after_end else []
    jobs = planned_jobs(node, site.config.executor, site.graph, detached=detached)
    work = _submit(node, attempt, site, jobs[0], [*success, *ended], detached, pause)
    finish = None
    if len(jobs) > 1:
        finish = _submit(node, attempt, site, jobs[1], [f"afterany:{work}", *success], detached)
    record = Jobs(work, finish, detached, jobs[0].resources.tasks)
    write_atomically(attempt / RECORD, msgspec.json.encode(record))
    return record


def _submit(
    node: Node,
    attempt: Path,
    site: Site,
    job: PlannedJob,
    dependency: list[str],
    detached: bool,
    pause: float | None = None,
) -> str:
    """Submit one job. Returns its id."""
    assert site.entry is not None, "a reader submits nothing"
    perform, run, resources = site.entry.perform, site.run.path, job.resources
    array = resources.tasks if resources.is_array else 0
    grace = site.config.executor.grace_seconds
    task = SlurmTask(str(run), node.name, str(attempt), job.duties, array, resources.nodes, detached, grace)
    folder = slurm_folder(run) / f"{name_of(attempt)}-{job.step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    outside = ",".join(scheduler.nodes_outside(resources.pool_nodes)) if resources.pool_nodes else ""
    slurm = job.executor(folder, run, node.name, site.config.executor, dependency, pause or 0.0, outside)

    def submit_job() -> str:
        with _without_job_variables(), contextlib.redirect_stderr(io.StringIO()):  # the error contains sbatch's message
            if array > 1:
                return str(slurm.map_array(perform, [task] * array)[0].job_id)
            return str(slurm.submit(perform, task).job_id)

    return scheduler.retry_until_answered(f"submitting stage {node.name}", submit_job).partition("_")[0]


@contextlib.contextmanager
def _without_job_variables() -> Iterator[None]:
    """Remove the variables that describe the current job, so that a job submits others like a login node does."""
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env((ROLE, ATTEMPT)):
        os.environ.update(kept)
        yield


def name_of(attempt: Path) -> str:
    """A short name of an attempt, independent of how its path is spelled."""
    return digest(str(attempt.resolve()))[:16]


def clear_folders(run: Path, live: set[str]) -> None:
    """Delete the scripts and pickles of jobs that have ended."""
    for folder in slurm_folder(run).glob("*"):
        ids = {path.name.partition("_")[0] for path in folder.glob("*_submission.sh")}
        if ids and not ids & live:
            shutil.rmtree(folder, ignore_errors=True)


def copy_output(attempt: Path, run: Path) -> None:
    """Copy the output of an attempt's jobs to its logs."""
    for log in job_logs(attempt, run):
        if log.parent != attempt:
            shutil.copyfile(log, attempt / log.name)


def job_logs(attempt: Path, run: Path) -> list[Path]:
    """Files with the output of an attempt's jobs, outside the stage's own log."""
    folders = [slurm_folder(run) / f"{name_of(attempt)}-{step}" for step in ("work", "finish")]
    found = {path.name: path for folder in (attempt, *folders) for path in sorted(folder.glob("*_log.out"))}
    return list(found.values())
