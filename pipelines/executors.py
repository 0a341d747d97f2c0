"""Executors: where a supervisor runs. All go through submitit but `inline`, which is a thread of the driver.

submitit passes jobs on as pickles, which run code when they are read. They lie in a private folder outside of the run
directory, which people copy and share, and are gone when the job has ended.
"""

import shutil
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import submitit

from contracts.fingerprint import digest
from pipelines.graph import Node
from pipelines.locked import home
from pipelines.supervisor import supervise

FOREVER_MINUTES = 60 * 24 * 365


class Job(Protocol):
    """A submitted supervisor."""

    def ended(self) -> bool:
        """Whether it runs no more, however it ended."""
        ...

    def clear(self, attempt: Path) -> None:
        """After the end: delete what the executor needed, its last words excepted, which go to the attempt's logs."""
        ...


@dataclass
class Running:
    """A stage that an executor works on."""

    node: Node
    attempt: Path
    job: Job
    key: str
    """What it is to publish."""


class Executor(Protocol):
    """Submits supervisors."""

    def submit(self, name: str, attempt: Path, run: Path) -> Job:
        """Start `supervise(attempt)`, for a stage of the run in the directory `run`."""
        ...


class LocalExecutor:
    """submitit's local executor: each stage is a job of its own on this machine."""

    def submit(self, name: str, attempt: Path, run: Path) -> Job:
        """Start the attempt in a process of its own."""
        folder = job_folder(run) / digest(str(attempt))[:16]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        executor = submitit.AutoExecutor(folder=folder, cluster="local")
        executor.update_parameters(name=name, timeout_min=FOREVER_MINUTES, stderr_to_stdout=True)
        # Ctrl-C reaches the whole terminal; the driver alone answers it, and ends its stages in order.
        answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return _SubmititJob(executor.submit(supervise, str(attempt)), folder)
        finally:
            signal.signal(signal.SIGINT, answer)


class _SubmititJob:
    def __init__(self, job: "submitit.Job[int]", folder: Path) -> None:
        self._job = job
        self._folder = folder

    def ended(self) -> bool:
        return self._job.done()

    def clear(self, attempt: Path) -> None:
        if not (attempt / "exit.json").exists():
            for log in self._folder.glob("*_log.out"):
                shutil.copyfile(log, attempt / "supervisor.log")
        shutil.rmtree(self._folder, ignore_errors=True)


class InlineExecutor:
    """Runs supervisors in threads of the driver, for debugging: one process less between you and the stage."""

    def submit(self, name: str, attempt: Path, run: Path) -> Job:
        """Start the attempt in a thread."""
        thread = threading.Thread(target=supervise, args=(str(attempt),), name=name, daemon=True)
        thread.start()
        return _ThreadJob(thread)


class _ThreadJob:
    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def clear(self, attempt: Path) -> None:
        pass


def job_folder(run: Path) -> Path:
    """Where the jobs of a run are described while they last."""
    return home() / "jobs" / digest(str(run))[:16]


def clear_job_folders(run: Path) -> None:
    """Delete what a killed driver of this run has left."""
    shutil.rmtree(job_folder(run), ignore_errors=True)


def make_executor(kind: str) -> Executor:
    """The executor named in the config."""
    return InlineExecutor() if kind == "inline" else LocalExecutor()
