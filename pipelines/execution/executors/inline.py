"""Runs supervisors in threads of the driver, which makes debugging easier."""

import threading
from pathlib import Path

from pipelines.execution.executors.base import Job
from pipelines.execution.executors.local import LocalExecutor, LocalJob
from pipelines.execution.supervisor import supervise_locally
from pipelines.graph import Node


class InlineExecutor(LocalExecutor):
    """Runs supervisors in threads of the driver."""

    kind = "inline"

    def submit(self, node: Node, attempt: Path) -> Job:
        """Start the attempt in a thread."""
        self.write_request(node, attempt)
        thread = threading.Thread(target=supervise_locally, args=(str(attempt),), name=node.name, daemon=True)
        thread.start()
        return _ThreadJob(thread, attempt)


class _ThreadJob(LocalJob):
    def __init__(self, thread: threading.Thread, attempt: Path) -> None:
        super().__init__(attempt)
        self._thread = thread

    def ended(self) -> bool:
        return not self._thread.is_alive()
