"""Starts a process for each tracker of the config, in the environment `tracking`, that sends it metrics.jsonl."""

import contextlib
import secrets
import time

import msgspec

from contracts.files import write_atomically
from contracts.points import METRICS
from pipelines.environments.launch import launch_command, stage_environment
from pipelines.environments.locked import TRACKING
from pipelines.graph import Graph
from pipelines.insight.readers import ReaderProcess
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, TrackerFailed
from tracking.task import MARK, TrackingTask, sent_file


def listen(run: RunDirectory, graph: Graph) -> "Trackers":
    """Send the run's metrics to the trackers of its config."""
    return Trackers(run)


class Trackers:
    """The processes that send metrics, each started when there is something to send."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._config = run.config
        self._waiting = set(self._config.tracking.chosen)
        self._processes: dict[str, ReaderProcess] = {}

    def __call__(self, events: list[Event]) -> None:
        """Start the trackers that have something to send, and record those that have failed."""
        for name in [name for name in self._waiting if self._has_unsent(name)]:
            self._waiting.discard(name)
            self._processes[name] = self._start(name)
        for name, process in list(self._processes.items()):
            if error := process.failure():
                del self._processes[name]
                self._run.record(TrackerFailed(tracker=name, error=error))

    def close(self) -> None:
        """Wait until all have sent everything, at most for the grace period."""
        deadline = time.monotonic() + self._config.tracking.grace_seconds
        for process in self._processes.values():
            process.end_input()
        for name, process in self._processes.items():
            if error := process.wait(deadline):
                with contextlib.suppress(OSError):  # a full disk, which the run itself reports
                    self._run.record(TrackerFailed(tracker=name, error=error))

    def _has_unsent(self, tracker: str) -> bool:
        """Whether metrics.jsonl has more than what was sent to a tracker."""
        path, sent = self._run.path / METRICS, sent_file(self._run.path, tracker)
        there = path.stat().st_size if path.exists() else 0
        try:
            return there > int(sent.read_text())
        except (FileNotFoundError, ValueError):
            return there > 0

    def _start(self, tracker: str) -> ReaderProcess:
        settings = self._config.tracking.chosen[tracker].model_dump(mode="json")
        config = self._config.settings()
        config.pop("tracking", None)
        task = TrackingTask(tracker, self._run_id(), self._run.path.name, str(self._run.path), settings, config)
        command, variables = launch_command(self._config.environments.tracking, TRACKING, ["-m", "tracking"])
        environment = {**stage_environment(variables), MARK: f"{self._run.path}/{tracker}"}
        log = self._run.path / "logs" / "tracking" / f"{tracker}.log"
        return ReaderProcess(command, environment, msgspec.json.encode(task), log)

    def _run_id(self) -> str:
        """The run's id in every tracker, generated on first use."""
        path = self._run.path / "tracking" / "id"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, secrets.token_hex(4).encode())
        return path.read_text()
