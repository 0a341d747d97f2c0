"""Executors: where a supervisor runs. All go through submitit but `inline`, which is a thread of the driver.

submitit passes jobs on as pickles, which run code when they are read. They lie in a private folder outside of the run
directory, which people copy and share, and are gone when the job has ended.
"""

import os
import shutil
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import submitit

from contracts.fingerprint import digest
from pipelines.config.run import RunConfig
from pipelines.environments.locked import home
from pipelines.execution.attempts import write_request
from pipelines.execution.supervisor import supervise_here
from pipelines.graph import Node
from pipelines.run.directory import RunDirectory

FOREVER_MINUTES = 60 * 24 * 365


class Job(Protocol):
    """A submitted supervisor."""

    def ended(self) -> bool:
        """Whether it runs no more, however it ended."""
        ...

    def news(self) -> str | None:
        """Why it does not run yet, where that is not only for a while; told whenever it changes."""
        ...

    def clear(self, attempt: Path) -> list[dict[str, str]]:
        """After the end: delete what the executor needed, its last words excepted, which go to the attempt's logs.

        Returns:
            What happened to it on the way that the run's report is to tell.
        """
        ...

    def cancel(self, attempt: Path) -> None:
        """Ask it to end soon."""
        ...


@dataclass
class Running:
    """A stage that an executor works on."""

    node: Node
    attempt: Path
    job: Job
    key: str
    """What it is to publish."""
    executor: str
    """The kind of the executor."""


class Executor(Protocol):
    """Submits supervisors."""

    kind: str

    def submit(self, node: Node, attempt: Path, run: Path) -> Job:
        """Write the request into the attempt's directory and start `supervise(attempt)`, here or elsewhere."""
        ...

    def adopt(self, node: Node, key: str, run: RunDirectory) -> Job | None:
        """The stage's latest attempt, if it was begun under this key by an earlier command and still goes on."""
        ...


class LocalExecutor:
    """submitit's local executor: each stage is a job of its own on this machine."""

    kind = "local"

    def __init__(self, config: RunConfig, parallel: int) -> None:
        self._config = config
        self._threads = max(1, (os.cpu_count() or 1) // parallel)

    def adopt(self, node: Node, key: str, run: RunDirectory) -> Job | None:
        """None: what runs here ends with its driver."""
        return None

    def submit(self, node: Node, attempt: Path, run: Path) -> Job:
        """Start the attempt in a process of its own."""
        write_request(node, attempt, run, self._config, self._threads, here=True)
        folder = job_folder(run) / "local" / digest(str(attempt))[:16]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        executor = submitit.AutoExecutor(folder=folder, cluster="local")
        executor.update_parameters(name=node.name, timeout_min=FOREVER_MINUTES, stderr_to_stdout=True)
        # Ctrl-C reaches the whole terminal; the driver alone answers it, and ends its stages in order.
        answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return _SubmititJob(executor.submit(supervise_here, str(attempt)), folder)
        finally:
            signal.signal(signal.SIGINT, answer)


class _SubmititJob:
    def __init__(self, job: "submitit.Job[int]", folder: Path) -> None:
        self._job = job
        self._folder = folder

    def ended(self) -> bool:
        return self._job.done()

    def news(self) -> str | None:
        return None

    def clear(self, attempt: Path) -> list[dict[str, str]]:
        if not (attempt / "exit.json").exists():
            for log in self._folder.glob("*_log.out"):
                attempt.mkdir(parents=True, exist_ok=True)  # somebody may have deleted the logs meanwhile
                shutil.copyfile(log, attempt / "supervisor.log")
        shutil.rmtree(self._folder, ignore_errors=True)
        return []

    def cancel(self, attempt: Path) -> None:
        ask_to_end(attempt)


class InlineExecutor(LocalExecutor):
    """Runs supervisors in threads of the driver, for debugging: one process less between you and the stage."""

    kind = "inline"

    def submit(self, node: Node, attempt: Path, run: Path) -> Job:
        """Start the attempt in a thread."""
        write_request(node, attempt, run, self._config, self._threads, here=True)
        thread = threading.Thread(target=supervise_here, args=(str(attempt),), name=node.name, daemon=True)
        thread.start()
        return _ThreadJob(thread)


class _ThreadJob:
    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def news(self) -> str | None:
        return None

    def clear(self, attempt: Path) -> list[dict[str, str]]:
        return []

    def cancel(self, attempt: Path) -> None:
        ask_to_end(attempt)


def ask_to_end(attempt: Path) -> None:
    """Ask the supervisor of an attempt to end it, also where somebody has deleted the logs meanwhile."""
    attempt.mkdir(parents=True, exist_ok=True)
    (attempt / "cancel").touch()


def job_folder(run: Path) -> Path:
    """Where the jobs of a run are described while they last."""
    return home() / "jobs" / digest(str(run.resolve()))[:16]


def clear_job_folders(run: Path) -> None:
    """Delete what a killed driver of this run has left of jobs on this machine."""
    shutil.rmtree(job_folder(run) / "local", ignore_errors=True)
