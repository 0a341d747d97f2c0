"""Has the hooks of the config told what happens, each by a process of its own."""

import contextlib
import os
import sys
import time

import msgspec

from pipelines.graph import Graph
from pipelines.insight.hooks.configured import begin_hooks, evaluated_policies
from pipelines.insight.hooks.task import EvaluatedPolicy, HookTask
from pipelines.insight.readers import ReaderProcess
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, HookFailed


def listen(run: RunDirectory, graph: Graph) -> "Hooks":
    """Tell the hooks of the run's config."""
    return Hooks(run, graph)


class Hooks:
    """The processes that tell the hooks: the run's files are all that they read."""

    def __init__(self, run: RunDirectory, graph: Graph) -> None:
        self._run = run
        self._hooks = run.config.hooks
        begin_hooks(run.config, run.path)
        evaluated = evaluated_policies(graph) if self._hooks else []
        self._processes = {name: self._start(name, evaluated) for name in self._hooks}

    def __call__(self, events: list[Event]) -> None:
        """Take note of those that have ended."""
        for name, process in list(self._processes.items()):
            if error := process.failure():
                del self._processes[name]
                self._run.record(HookFailed(hook=name, error=error))

    def close(self) -> None:
        """Wait until all are told everything."""
        begun = time.monotonic()
        for process in self._processes.values():
            process.end_input()
        for name, process in self._processes.items():
            if error := process.wait(begun + self._hooks[name].grace_seconds):
                with contextlib.suppress(OSError):  # a full disk has told of itself
                    self._run.record(HookFailed(hook=name, error=error))

    def _start(self, name: str, evaluated: list[EvaluatedPolicy]) -> ReaderProcess:
        hook = self._hooks[name]
        task = HookTask(
            name, hook.function, hook.settings, list(hook.kinds), str(self._run.path), hook.grace_seconds, evaluated
        )
        log = self._run.path / "logs" / "hooks" / f"{name}.log"
        command = [sys.executable, "-P", "-m", "pipelines.insight.hooks"]
        return ReaderProcess(command, os.environ, msgspec.json.encode(task), log)
