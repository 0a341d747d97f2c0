"""The driver: runs a graph's stages as soon as their inputs are published, each at most once."""

import os
import shlex
import signal
import sys
import time
from dataclasses import replace
from types import FrameType
from typing import NoReturn

from contracts import stopping
from contracts.errors import UserError
from contracts.files import appears
from contracts.fingerprint import RELEASED
from contracts.manifest import MANIFEST
from contracts.stage import require_space
from pipelines.config.run import RunConfig
from pipelines.environments.launch import probe_versions
from pipelines.execution.attempts import Retries, StageFailedError, last_words, require_room, settle, write_decision
from pipelines.execution.executors import Executor, InlineExecutor, LocalExecutor, Running, clear_job_folders
from pipelines.execution.slurm.events import in_words
from pipelines.execution.slurm.executor import AttachedExecutor, look_back
from pipelines.execution.slurm.resources import resources_of
from pipelines.execution.supervisor import Ending, end_orphans, ending_of, log_of
from pipelines.graph import Graph, Node
from pipelines.insight.display import Display
from pipelines.machine import gpu_count
from pipelines.run.decisions import Decision, decide, make_room
from pipelines.run.directory import CANCEL, RunDirectory
from pipelines.run.metrics import write_metrics
from pipelines.run.retention import (
    Retention,
    drop_aside,
    may_be_released,
    released_inputs,
    restore,
    set_aside,
    why_again,
)

POLL_SECONDS = 0.1
END_SECONDS = 20.0


class Driver:
    """Drives one run. Its state is what is on the disk: killed at any instant, the same command continues."""

    def __init__(self, run: RunDirectory, graph: Graph, config: RunConfig, display: Display) -> None:
        self.run = run
        self.graph = graph
        # Weights can go once their policy is judged: then one iteration is finished after another.
        self.order = graph.by_urgency() if config.retention.keep == "all" else list(graph.nodes.values())
        self.config = config
        self.display = display
        self.executors: dict[str, Executor] = {}
        self.parallel = config.executor.parallel or default_parallel()
        self.published: set[str] = set()
        self.running: dict[str, Running] = {}
        self.retries = Retries(config.executor.retries, config.executor.backoff_seconds)
        self.retention = Retention(run, graph, config.retention, display.note)
        self.again: dict[str, str] = {}  # released stages that are to be made again, and why
        self.ran = 0
        self.judged = False  # whether an evaluation was reused since the metrics were written

    def drive(self) -> int:
        """Publish every stage of the graph; returns how many had to be run.

        Raises:
            UserError: a stage found a mistake of the user's.
            StageFailedError: a stage failed otherwise.
        """
        for pid in end_orphans(self.run.path):
            self.run.record("orphan ended", pid=pid)
        clear_job_folders(self.run.path)
        look_back(self.run, self.graph, self.config.executor)
        self.run.clear_scratch()
        restore(self.run.path)
        for number in stopping.heeded((*stopping.SIGNALS, signal.SIGHUP)):
            signal.signal(number, _interrupt)
        with self.retention:
            try:
                while len(self.published) < len(self.graph.nodes):
                    if (self.run.path / CANCEL).exists():  # by `pipeline cancel`, on any machine
                        raise KeyboardInterrupt
                    self.start_ready()
                    self.collect_ended()
                    self.tell_news()
                    self.retention.poll()
                    self.display.refresh(self.running)
                    time.sleep(POLL_SECONDS)
            finally:
                self.end_running()
                clear_job_folders(self.run.path)
                self.run.clear_scratch()
            self.retention.apply(self.published)
            while self.retention.poll():
                time.sleep(POLL_SECONDS)
        return self.ran

    def start_ready(self) -> None:
        """Reuse or start the stages whose inputs are published, the most urgent first, as many as may run."""
        for node in self.order:
            if node.name in self.published or node.name in self.running:
                continue
            if not self.published.issuperset(node.needs):
                continue
            if not self.retries.waits(node.name) and self.has_room(node):
                self.reuse_or_start(node)
        if self.judged:
            write_metrics(self.run.path, self.graph)
            self.judged = False

    def has_room(self, node: Node) -> bool:
        """Whether one more stage may run where this one does. A cluster decides for itself, unless the user does."""
        executor = self.config.executor
        there = resources_of(node, executor).executor
        if there == "slurm" and executor.parallel is None:
            return True
        return sum(running.executor == there for running in self.running.values()) < self.parallel

    def executor_of(self, node: Node) -> Executor:
        """Where a stage runs."""
        kind = resources_of(node, self.config.executor).executor
        if kind not in self.executors:
            if kind == "slurm":
                self.executors[kind] = AttachedExecutor(self.config, self.graph)
            else:
                local = InlineExecutor if kind == "inline" else LocalExecutor
                self.executors[kind] = local(self.config, self.parallel)
        return self.executors[kind]

    def reuse_or_start(self, node: Node) -> None:
        """Decide about one stage and act on it."""
        environment = self.config.environments.of(node.environment)
        decision = decide(node, probe_versions(environment, node.environment), self.run.path)
        if decision.reuse and node.name in self.again and (node.output / RELEASED).is_file():
            decision = Decision(False, self.again[node.name], decision.key)
        if not decision.reuse and self.make_inputs_again(node):
            return
        make_room(node, decision, self.run.path)
        if decision.reuse:
            self.published.add(node.name)
            self.display.reused(node, decision.reason)
            self.judged = self.judged or node.stage.name == "evaluation"
            return
        if (node.output / RELEASED).is_file():
            set_aside(node.output)
        require_room(node, self.graph, self.config)
        executor = self.executor_of(node)
        job = executor.adopt(node, decision.key, self.run)
        if job is None:
            attempt = self.run.new_attempt(node.name)
            write_decision(attempt, decision)
            job = executor.submit(node, attempt, self.run.path)
            self.run.record("started", stage=node.name, reason=decision.reason, key=decision.key, attempt=attempt.name)
        else:
            decision = replace(decision, reason="goes on since an earlier command")
            attempt = self.run.attempts(node.name)[-1]
        self.running[node.name] = Running(node, attempt, job, decision.key, executor.kind)
        self.display.started(node, decision.reason)

    def make_inputs_again(self, node: Node) -> bool:
        """Have the stages run again whose deleted weights `node` needs; whether there are any to wait for."""
        released = released_inputs(node, self.graph)
        for name in released:
            self.again[name] = why_again(node.name)
            self.undo(name)
        return bool(released)

    def undo(self, name: str) -> None:
        """Have a stage decided about once more that was published already."""
        if name in self.published:
            self.published.remove(name)
            self.display.done -= 1

    def collect_ended(self) -> None:
        """Take note of stages that have ended: published, to be tried again, or failed, which stops the run."""
        for running in list(self.running.values()):
            if not running.job.ended():
                continue
            del self.running[running.node.name]
            for event in running.job.clear(running.attempt):
                self.run.record("slurm", stage=running.node.name, **event)
                self.display.note(f"slurm  {running.node.name}  ({in_words(event)})")
            if not appears(running.node.output / MANIFEST):
                self.retry_or_fail(running)
                continue
            artifact = settle(self.run, self.graph, running.node, running.key, running.attempt)
            self.ran += 1
            if self.published.issuperset(running.node.needs):  # no input is about to change after all
                self.published.add(running.node.name)
            self.display.published(running.node, artifact)
            self.finish_again(running.node)
            if may_be_released(running.node) or running.node.stage.name == "evaluation":
                self.retention.apply(self.published)

    def tell_news(self) -> None:
        """Say where a stage that was started waits for something."""
        for name, running in self.running.items():
            if text := running.job.news():
                self.display.note(f"waits  {name}  ({text})")

    def finish_again(self, node: Node) -> None:
        """After a released stage has been made again: where it came out differently, so may what was made from it."""
        if self.again.pop(node.name, None) is None or drop_aside(node.output, self.run.path):
            return
        self.display.note(f"differs {node.name}  (from what it was before its weights were deleted)")
        outdated = {node.name}
        for later in self.graph.nodes.values():
            if outdated.intersection(later.needs):
                outdated.add(later.name)
                self.undo(later.name)

    def retry_or_fail(self, running: Running) -> None:
        """After an attempt that published nothing: plan the next one, or stop the run."""
        require_space(self.run.path, "directory")
        ending = ending_of(running.attempt)
        name = running.node.name
        pause = self.retries.pause_after(name, ending.kind)
        self.run.record(
            "failed", stage=name, attempt=running.attempt.name, kind=ending.kind, how=ending.how, retry_in=pause
        )
        if pause is None:
            self.fail(running, ending)
        else:
            self.display.retried(running.node, ending.how, pause)

    def fail(self, running: Running, ending: Ending) -> NoReturn:
        """Stop the run with what the stage left as its reason."""
        name, log = running.node.name, log_of(running.attempt)
        self.display.failed(running.node)
        program = ["python", "-m", "pipelines"] if sys.argv[0].endswith("__main__.py") else [sys.argv[0]]
        resume = f"Then continue with: {shlex.join([*program, *sys.argv[1:]])}"
        if ending.kind == "user":
            raise UserError(f"stage {name}: {ending.reason}\n  log: {log}\n  {resume}")
        reason = ending.reason or last_words(running.attempt)
        raise StageFailedError(f"stage {name} {ending.how}\n{reason.rstrip()}\n  log: {log}\n  {resume}", 1)

    def end_running(self) -> None:
        """End the stages that still run: after a failure or an interrupt. What they published in part is kept."""
        if not self.running:
            return
        grace = self.config.executor.grace_seconds
        self.display.ending(self.running, grace)
        try:
            for running in self.running.values():
                running.job.cancel(running.attempt)
            deadline = time.monotonic() + grace + END_SECONDS
            while any(not running.job.ended() for running in self.running.values()) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        finally:  # also when interrupted once more
            end_orphans(self.run.path)


def default_parallel() -> int:
    """Stages at once: one where GPUs are, since a stage uses all of them; else two, or one per two cores."""
    if gpu_count():
        return 1
    return max(2, (os.cpu_count() or 2) // 2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
