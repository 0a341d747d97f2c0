"""The driver: runs a graph's stages as soon as their inputs are published, each at most once."""

import contextlib
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from contracts import stopping
from contracts.errors import UserError
from contracts.files import appears
from contracts.manifest import MANIFEST
from pipelines.execution.attempts import StageFailedError
from pipelines.execution.endings import Ending, log_of, log_tail
from pipelines.execution.executors.base import Executors, Job, Site
from pipelines.execution.lifecycle import Lifecycle
from pipelines.execution.listeners import Broadcast, Listen
from pipelines.execution.supervisor import end_orphans
from pipelines.graph import Node
from pipelines.planning.placement import cluster_of
from pipelines.run.decisions import why_again
from pipelines.run.directory import CANCEL
from pipelines.run.events import OrphanEnded, RunEnded, RunEnding, RunStarted, StageWaits
from pipelines.run.retention import released_inputs
from pipelines.run.superseded import end_deletions

POLL_SECONDS = 0.1
END_SECONDS = 20.0


@dataclass
class Running:
    """A stage that an executor works on."""

    node: Node
    attempt: Path
    job: Job
    key: str
    """What it is to publish."""


class Driver:
    """Drives one run. Its state is what is on the disk: killed at any instant, the same command continues."""

    def __init__(self, site: Site, listeners: Sequence[Listen]) -> None:
        self.run, self.graph, self.config = site.run, site.graph, site.config
        # Weights can go once their policy is judged: then one iteration is finished after another.
        whole = self.config.retention.keep == "all"
        self.order = self.graph.by_urgency() if whole else list(self.graph.nodes.values())
        self.executors = Executors(site)
        self.lifecycle = Lifecycle(self.run, self.graph, self.config)
        self.broadcast = Broadcast(self.run, listeners)
        self.cluster = cluster_of(self.config)
        self.published: set[str] = set()
        self.running: dict[str, Running] = {}
        self.again: dict[str, str] = {}  # released stages that are to be made again, and why
        self.ran = 0

    def drive(self) -> int:
        """Publish every stage of the graph; returns how many had to be run.

        Raises:
            UserError: a stage found a mistake of the user's.
            StageFailedError: a stage failed otherwise.
        """
        by = f"process {os.getpid()} on {socket.gethostname()}"
        self.run.record(RunStarted(stages=len(self.graph.nodes), by=by))
        ended = RunEnded(outcome="failed")
        try:
            self.recover()
            for number in stopping.heeded((*stopping.SIGNALS, signal.SIGHUP)):
                signal.signal(number, _interrupt)
            with self.lifecycle.retention:
                self.publish_all()
            ended = RunEnded(outcome="finished")
        except KeyboardInterrupt:
            ended = RunEnded(outcome="interrupted")
            raise
        finally:
            with contextlib.suppress(OSError):  # a full disk is told by what it has stopped
                self.run.record(ended)
            self.broadcast.close()
        return self.ran

    def recover(self) -> None:
        """See to what earlier commands have left: processes, jobs, scratch files."""
        for pid in end_orphans(self.run.path):
            self.run.record(OrphanEnded(pid=pid))
        for executor in {*self.executors.used(), *self.executors.lasting()}:
            executor.recover()
        self.run.clear_scratch()
        end_deletions(self.run.path)

    def publish_all(self) -> None:
        """Run the stages, then what retention has left to do."""
        try:
            while len(self.published) < len(self.graph.nodes):
                if (self.run.path / CANCEL).exists():  # by `pipeline cancel`, on any machine
                    raise KeyboardInterrupt
                self.start_ready()
                self.collect_ended()
                self.tell()
                time.sleep(POLL_SECONDS)
        finally:
            self.end_running()
            for executor in self.executors.made():
                executor.close()
            self.run.clear_scratch()
        self.lifecycle.retention.apply(self.published)
        while self.lifecycle.retention.poll():
            self.broadcast.tell()
            time.sleep(POLL_SECONDS)

    def start_ready(self) -> None:
        """Reuse or start the stages whose inputs are published, the most urgent first, as many as may run."""
        for node in self.order:
            if node.name in self.published or node.name in self.running:
                continue
            if not self.published.issuperset(node.needs):
                continue
            if not self.lifecycle.retries.waits(node.name) and self.may_start(node):
                self.reuse_or_start(node)

    def may_start(self, node: Node) -> bool:
        """Whether the devices that a stage was given are free. A scheduler decides for itself, unless the user does."""
        assert node.placement is not None
        taken = (running.node.placement for running in self.running.values())
        return self.cluster.has_room(node.placement, filter(None, taken))

    def reuse_or_start(self, node: Node) -> None:
        """Decide about one stage and act on it."""
        decision = self.lifecycle.decide(node, self.again.get(node.name))
        if not decision.reuse and self.make_inputs_again(node):
            return
        self.lifecycle.act(node, decision)
        if decision.reuse:
            self.published.add(node.name)
            return
        executor = self.executors.of(node)
        job = executor.adopt(node, decision.key)
        if job is None:
            attempt = self.lifecycle.begin_attempt(node, decision)
            job = executor.submit(node, attempt)
        else:
            attempt = self.run.attempts(node.name)[-1]
            decision = replace(decision, reason="goes on since an earlier command")
        self.running[node.name] = Running(node, attempt, job, decision.key)
        self.lifecycle.start(node, decision, attempt)

    def make_inputs_again(self, node: Node) -> bool:
        """Have the stages run again whose deleted weights `node` needs; whether there are any to wait for."""
        released = released_inputs(node, self.graph)
        self.published.difference_update(self.lifecycle.invalidate(released, why_again(node.name)))
        self.again |= dict.fromkeys(released, why_again(node.name))
        return bool(released)

    def collect_ended(self) -> None:
        """Take note of stages that have ended: published, to be tried again, or failed, which stops the run."""
        for running in list(self.running.values()):
            if not running.job.ended():
                continue
            node = running.node
            del self.running[node.name]
            for event in running.job.clear():
                self.run.record(event)
            if not appears(node.output / MANIFEST):
                ending, pause = self.lifecycle.fail(node, running.attempt)
                if pause is None:
                    self.fail(running, ending)
                continue
            outdated = self.lifecycle.finalize(node, running.key, running.attempt)
            self.ran += 1
            self.again.pop(node.name, None)
            if self.published.issuperset(node.needs):  # no input is about to change after all
                self.published.add(node.name)
            self.published.difference_update(outdated)
            self.lifecycle.retain(node, self.published)

    def tell(self) -> None:
        """Tell the listeners what is new, and where a stage that was started waits for something."""
        for name, running in self.running.items():
            if text := running.job.news():
                self.run.record(StageWaits(stage=name, text=text))
        self.lifecycle.retention.poll()
        self.broadcast.tell(self.lifecycle.untold())

    def fail(self, running: Running, ending: Ending) -> NoReturn:
        """Stop the run with what the stage left as its reason."""
        name, log = running.node.name, log_of(running.attempt)
        program = ["python", "-m", "pipelines"] if sys.argv[0].endswith("__main__.py") else [sys.argv[0]]
        resume = f"Then continue with: {shlex.join([*program, *sys.argv[1:]])}"
        if ending.kind == "user":
            raise UserError(f"stage {name}: {ending.reason}\n  log: {log}\n  {resume}")
        reason = ending.reason or log_tail(running.attempt)
        raise StageFailedError(f"stage {name} {ending.how}\n{reason.rstrip()}\n  log: {log}\n  {resume}", 1)

    def end_running(self) -> None:
        """End the stages that still run: after a failure or an interrupt. What they published in part is kept."""
        if not self.running:
            return
        grace = self.config.executor.grace_seconds
        try:
            with contextlib.suppress(OSError):
                self.run.record(RunEnding(stages=list(self.running), grace_seconds=grace))
            self.broadcast.tell()
            for running in self.running.values():
                running.job.cancel()
            deadline = time.monotonic() + grace + END_SECONDS
            while any(not running.job.ended() for running in self.running.values()) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        finally:  # also when interrupted once more
            end_orphans(self.run.path)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
