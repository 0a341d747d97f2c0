"""Executors: where a supervisor runs. All go through submitit but `inline`, which is a thread of the driver."""

import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import submitit

from pipelines.graph import Node
from pipelines.supervisor import supervise

FOREVER_MINUTES = 60 * 24 * 365


class Job(Protocol):
    """A submitted supervisor."""

    def ended(self) -> bool:
        """Whether it runs no more, however it ended."""
        ...


@dataclass
class Running:
    """A stage that an executor works on."""

    node: Node
    attempt: Path
    job: Job


class Executor(Protocol):
    """Submits supervisors."""

    def submit(self, name: str, attempt: Path) -> Job:
        """Start `supervise(attempt)`."""
        ...


class LocalExecutor:
    """submitit's local executor: each stage is a job of its own on this machine."""

    def submit(self, name: str, attempt: Path) -> Job:
        """Start the attempt in a process of its own."""
        executor = submitit.AutoExecutor(folder=attempt / "submitit", cluster="local")
        executor.update_parameters(name=name, timeout_min=FOREVER_MINUTES, stderr_to_stdout=True)
        # Ctrl-C reaches the whole terminal; the driver alone answers it, and ends its stages in order.
        answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return _SubmititJob(executor.submit(supervise, str(attempt)))
        finally:
            signal.signal(signal.SIGINT, answer)


class _SubmititJob:
    def __init__(self, job: "submitit.Job[int]") -> None:
        self._job = job

    def ended(self) -> bool:
        return self._job.done()


class InlineExecutor:
    """Runs supervisors in threads of the driver, for debugging: one process less between you and the stage."""

    def submit(self, name: str, attempt: Path) -> Job:
        """Start the attempt in a thread."""
        thread = threading.Thread(target=supervise, args=(str(attempt),), name=name, daemon=True)
        thread.start()
        return _ThreadJob(thread)


class _ThreadJob:
    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def ended(self) -> bool:
        return not self._thread.is_alive()


def make_executor(kind: str) -> Executor:
    """The executor named in the config."""
    return InlineExecutor() if kind == "inline" else LocalExecutor()
