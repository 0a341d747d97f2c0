"""Starts a process for each hook of the config, which calls the hook's function."""

import contextlib
import os
import sys
import time

import msgspec

from pipelines.graph import Graph
from pipelines.insight.hooks.configured import evaluated_policies, initialize_hooks
from pipelines.insight.hooks.task import EvaluatedPolicy, HookTask
from pipelines.insight.readers import ReaderProcess
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, HookFailed


def listen(run: RunDirectory, graph: Graph) -> "Hooks":
    """Start the hooks of the run's config."""
    return Hooks(run, graph)


class Hooks:
    """The processes of the hooks. They learn of events from the run's files alone."""

    def __init__(self, run: RunDirectory, graph: Graph) -> None:
        self._run = run
        self._hooks = run.config.hooks
        initialize_hooks(run.config, run.path)
        evaluated = evaluated_policies(graph) if self._hooks else []
        self._processes = {name: self._start(name, evaluated) for name in self._hooks}

    def __call__(self, events: list[Event]) -> None:
        """Record hooks whose process has failed."""
        for name, process in list(self._processes.items()):
            if error := process.failure():
                del self._processes[name]
                self._run.record(HookFailed(hook=name, error=error))

    def close(self) -> None:
        """Wait until all hooks have been called for everything, at most for their grace periods."""
        begun = time.monotonic()
        for process in self._processes.values():
            process.end_input()
        for name, process in self._processes.items():
            if error := process.wait(begun + self._hooks[name].grace_seconds):
                with contextlib.suppress(OSError):  # a full disk, which the run itself reports
                    self._run.record(HookFailed(hook=name, error=error))

    def _start(self, name: str, evaluated: list[EvaluatedPolicy]) -> ReaderProcess:
        hook = self._hooks[name]
        task = HookTask(
            name, hook.function, hook.settings, list(hook.kinds), str(self._run.path), hook.grace_seconds, evaluated
        )
        log = self._run.path / "logs" / "hooks" / f"{name}.log"
        command = [sys.executable, "-P", "-m", "pipelines.insight.hooks"]
        return ReaderProcess(command, os.environ, msgspec.json.encode(task), log)
