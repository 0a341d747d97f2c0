"""This machine, through submitit's local executor: each stage's supervisor is a process of its own.

submitit passes jobs on as pickles, which run code when they are read. They lie in a private folder outside of the run
directory, which people copy and share, and are gone when the job has ended.
"""

import os
import shutil
import signal
from pathlib import Path

import msgspec
import submitit

from contracts.fingerprint import digest
from contracts.manifest import MANIFEST
from pipelines.environments.launch import stage_environment
from pipelines.environments.paths import home, source_root
from pipelines.execution.attempts import write_request
from pipelines.execution.executors.base import Executor, Job, Site
from pipelines.execution.supervisor import RUN, AttemptRequest, supervise_here
from pipelines.execution.warm import READY_SECONDS, WarmProcesses
from pipelines.graph import Node
from pipelines.machine import default_parallel
from pipelines.run.events import JobEnded

FOREVER_MINUTES = 60 * 24 * 365

WORTH_IT = 2
"""Stages with models that are still to run, from which on their libraries are imported by a process of its own."""


def is_heavy(node: Node) -> bool:
    """Whether a stage loads a model, and so imports what that takes."""
    return bool(node.stage.models(node.config))


class LocalExecutor(Executor):
    """Starts each attempt in a process of its own, which ends with the driver."""

    kind = "local"

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._threads = max(1, (os.cpu_count() or 1) // (site.config.executor.parallel or default_parallel()))

        self._warm = WarmProcesses(self.run.path / "logs" / "warm")

    def recover(self) -> None:
        """Delete what a killed driver has left of its jobs on this machine."""
        shutil.rmtree(job_folder(self.run.path) / "local", ignore_errors=True)

    def close(self) -> None:
        """The same, and end the warm processes."""
        self._warm.close()
        self.recover()

    def warmed(self, node: Node, request: AttemptRequest) -> AttemptRequest:
        """The same request, with the process that the stage is forked from if that is worth it."""
        locked = self.config.environments.of(node.environment).is_locked
        preload = source_root() / node.package / "preload.py"
        if not (self.config.executor.warm and locked and preload.is_file()):
            return request
        alike = [other for other in self.graph.nodes.values() if is_heavy(other) and other.package == node.package]
        left = sum(not (other.output / MANIFEST).is_file() for other in alike)
        environment = {**stage_environment(request.environment), RUN: str(self.run.path)}
        for name in request.unset:
            environment.pop(name, None)
        path = self._warm.address(
            node.package, request.argv[0], environment, request.directory, start=is_heavy(node) and left >= WORTH_IT
        )
        if path is None:
            return request
        patience = READY_SECONDS if is_heavy(node) else 0.0
        return msgspec.structs.replace(request, warm=str(path), warm_seconds=patience)

    def submit(self, node: Node, attempt: Path) -> Job:
        """Start the attempt."""
        write_request(node, attempt, self.run.path, self.config, self._threads, here=True, warm=self.warmed)
        folder = job_folder(self.run.path) / "local" / digest(str(attempt))[:16]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        executor = submitit.AutoExecutor(folder=folder, cluster="local")
        executor.update_parameters(name=node.name, timeout_min=FOREVER_MINUTES, stderr_to_stdout=True)
        # Ctrl-C reaches the whole terminal; the driver alone answers it, and ends its stages in order.
        answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return _SubmititJob(executor.submit(supervise_here, str(attempt)), attempt, folder)
        finally:
            signal.signal(signal.SIGINT, answer)


class JobHere:
    """A supervisor on this machine, which looks for a request to end."""

    def __init__(self, attempt: Path) -> None:
        self._attempt = attempt

    def news(self) -> str | None:
        """Nothing: it starts at once."""
        return None

    def clear(self) -> list[JobEnded]:
        """Nothing is left."""
        return []

    def cancel(self) -> None:
        """Ask the supervisor to end, also where somebody has deleted the logs meanwhile."""
        self._attempt.mkdir(parents=True, exist_ok=True)
        (self._attempt / "cancel").touch()


class _SubmititJob(JobHere):
    def __init__(self, job: "submitit.Job[int]", attempt: Path, folder: Path) -> None:
        super().__init__(attempt)
        self._job = job
        self._folder = folder

    def ended(self) -> bool:
        return self._job.done()

    def clear(self) -> list[JobEnded]:
        if not (self._attempt / "exit.json").exists():
            for log in self._folder.glob("*_log.out"):
                self._attempt.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(log, self._attempt / "supervisor.log")
        shutil.rmtree(self._folder, ignore_errors=True)
        return []


def job_folder(run: Path) -> Path:
    """Where the jobs of a run are described while they last."""
    return home() / "jobs" / digest(str(run.resolve()))[:16]
