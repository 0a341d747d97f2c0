"""The driver: runs the stages of a graph as soon as their inputs are published."""

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

from annotation.gating.decision import GateDecision
from contracts import stopping
from contracts.artifacts import Artifact
from contracts.errors import RunStoppedError, UserError
from contracts.files import exists_uncached
from contracts.manifest import MANIFEST
from contracts.processes import wait_for_end
from pipelines.execution.attempts import StageFailedError
from pipelines.execution.endings import Ending, has_begun, log_of, log_tail
from pipelines.execution.executors.base import Executors, Job, Site
from pipelines.execution.lifecycle import Lifecycle
from pipelines.execution.listeners import Broadcast, Listen
from pipelines.execution.supervisor import end_orphans
from pipelines.graph import Node
from pipelines.planning.cluster import cluster_of
from pipelines.planning.placement import placed_graph
from pipelines.planning.scheduling import Admission, start_order
from pipelines.run.decisions import Decision, may_reproduce_output, why_rebuilt
from pipelines.run.directory import CANCEL
from pipelines.run.events import OrphanEnded, RunEnded, RunEnding, RunStarted, StageWaits
from pipelines.run.gates import decision_after
from pipelines.run.retention import released_inputs
from pipelines.run.superseded import finish_deletions

POLL_SECONDS = 0.1
END_SECONDS = 20.0
"""Seconds that stages may take to end in addition to their grace period."""


@dataclass
class Running:
    """A stage that an executor is running."""

    node: Node
    attempt: Path
    job: Job
    decision: Decision
    """The decision to run it."""


class Driver:
    """Drives one run. Its state is on disk: if killed at any instant, the same command continues."""

    def __init__(self, site: Site, listeners: Sequence[Listen]) -> None:
        self.run, self.graph, self.config = site.run, site.graph, site.config
        self.order = start_order(self.graph, self.config)
        self.executors = Executors(site)
        self.lifecycle = Lifecycle(self.run, self.graph, self.config)
        self.broadcast = Broadcast(self.run, listeners)
        self.cluster = cluster_of(self.config)
        self.published: set[str] = set()
        self.running: dict[str, Running] = {}
        self.to_rebuild: dict[str, str] = {}  # released stages whose weights are rebuilt, with the reason
        self.stopped: GateDecision | None = None
        self.rolled_back: set[str] = set()  # running stages of iterations that a rollback has changed since
        self.ran = 0

    def drive(self) -> int:
        """Publish every stage of the graph. Returns the number of stages that had to run.

        Raises:
            UserError: a stage failed because of a user's mistake.
            StageFailedError: a stage failed for another reason.
            RunStoppedError: a gate has stopped the run.
        """
        by = f"process {os.getpid()} on {socket.gethostname()}"
        self.run.record(RunStarted(stages=len(self.graph.nodes), by=by))
        ended = RunEnded(outcome="failed")
        try:
            self.recover()
            for number in stopping.not_ignored((*stopping.SIGNALS, signal.SIGHUP)):
                signal.signal(number, _interrupt)
            with self.lifecycle.retention:
                self.publish_all()
            ended = RunEnded(outcome="stopped" if self.stopped else "finished")
        except KeyboardInterrupt:
            ended = RunEnded(outcome="interrupted")
            raise
        finally:
            with contextlib.suppress(OSError):  # a full disk has its own error message
                self.run.record(ended)
            self.broadcast.close()
        if self.stopped:
            raise RunStoppedError(self.stopped.reason or "")
        return self.ran

    def recover(self) -> None:
        """Clean up what earlier commands left: processes, jobs, scratch files."""
        for pid in end_orphans(self.run.path):
            self.run.record(OrphanEnded(pid=pid))
        for executor in {*self.executors.used(), *self.executors.outliving_drivers()}:
            executor.recover()
        self.run.clear_scratch()
        finish_deletions(self.run.path)

    def publish_all(self) -> None:
        """Run the stages, then finish the work of retention."""
        try:
            while not self.published.issuperset(node.name for node in self.order):
                if (self.run.path / CANCEL).exists():  # requested by `pipeline cancel`, on any machine
                    raise KeyboardInterrupt
                self.start_ready()
                # Before `collect_ended`: if one of these ends from here on, the wait below returns at once.
                pids = [running.job.pid for running in self.running.values() if not running.job.ended()]
                before = len(self.running)
                self.collect_ended()
                self.notify()
                if len(self.running) == before:
                    wait_for_end(filter(None, pids), POLL_SECONDS)
        finally:
            self.end_running()
            for executor in self.executors.created():
                executor.close()
            self.run.clear_scratch()
        self.lifecycle.retention.apply(self.published)
        while self.lifecycle.retention.poll():
            self.broadcast.notify()
            time.sleep(POLL_SECONDS)

    def start_ready(self) -> None:
        """Reuse or start stages whose inputs are published, the most urgent first, as many as may run at once.

        Producers that running stages follow come first: a producer that was killed has to restart, and its followers
        release their devices only once it has published.
        """
        if self.rolled_back:
            return  # they may read artifacts that will be replaced
        admission = Admission(self.cluster, filter(None, (running.node.placement for running in self.running.values())))
        awaited = {path for running in self.running.values() for path in running.decision.follows}
        for node in sorted(self.order, key=lambda node: str(node.output) not in awaited):
            if node.name in self.published or node.name in self.running or not self.may_start(node):
                continue
            assert node.placement is not None
            if admission.admits(node.placement):
                self.reuse_or_start(node)
                if node.name not in self.running:
                    admission.release(node.placement)
                if node.name in self.published and self.apply_gate(node):
                    return  # the order of stages has changed
        if self.config.placement.streaming:
            self.start_followers(admission)

    def start_followers(self, admission: Admission) -> None:
        """Start stages on the shards that an input's producer has finished, on devices that no other stage can use."""
        for node in self.order:
            if node.name in self.published or node.name in self.running or self.lifecycle.retries.waits(node.name):
                continue
            maker = self.maker_to_follow(node)
            assert node.placement is not None
            if maker is not None and admission.admits(node.placement):
                decision = self.lifecycle.follow(node, maker.node, maker.decision)
                self.lifecycle.act(node, decision)
                self.start(node, decision)

    def maker_to_follow(self, node: Node) -> Running | None:
        """The running stage that `node` can follow, or None; all its other inputs must be published."""
        followed = self.graph.streams_from(node)
        maker = None if followed is None else self.running.get(followed.name)
        if maker is None:
            return None
        if maker.decision.follows or not self.published.issuperset({*node.needs} - {maker.node.name}):
            return None
        reproduces = may_reproduce_output(maker.node, maker.decision.key, self.run.path)
        return maker if has_begun(maker.attempt) and not reproduces else None

    def may_start(self, node: Node) -> bool:
        """Whether a stage has everything it needs except devices."""
        return self.published.issuperset(node.needs) and not self.lifecycle.retries.waits(node.name)

    def reuse_or_start(self, node: Node) -> None:
        """Decide about one stage and act on the decision."""
        decision = self.lifecycle.decide(node, self.to_rebuild.get(node.name))
        if not decision.reuse and self.rebuild_inputs(node):
            return
        self.lifecycle.act(node, decision)
        if decision.reuse:
            self.published.add(node.name)
            return
        self.start(node, decision)

    def start(self, node: Node, decision: Decision) -> None:
        """Begin an attempt at a stage, or adopt one that an earlier command left running."""
        executor = self.executors.of(node)
        job = executor.adopt(node, decision.key)
        if job is None:
            attempt = self.lifecycle.begin_attempt(node, decision)
            job = executor.submit(node, attempt)
        else:
            attempt = self.run.attempts(node.name)[-1]
            decision = replace(decision, reason="continues from an earlier command")
        self.running[node.name] = Running(node, attempt, job, decision)
        self.lifecycle.start(node, decision, attempt)

    def rebuild_inputs(self, node: Node) -> bool:
        """Rerun the stages whose deleted weights `node` needs. Returns whether there are any."""
        released = released_inputs(node, self.graph)
        self.published.difference_update(self.lifecycle.invalidate(released, why_rebuilt(node.name)))
        self.to_rebuild |= dict.fromkeys(released, why_rebuilt(node.name))
        return bool(released)

    def collect_ended(self) -> None:
        """Handle stages that have ended: published, to be retried, or failed, which stops the run."""
        for running in list(self.running.values()):
            if not running.job.ended():
                continue
            node, decision = running.node, running.decision
            published = exists_uncached(node.output / MANIFEST)
            rolled_back = node.name in self.rolled_back
            if decision.follows and published:  # if it ended before its input's producer, it is handled after that
                if not rolled_back and not self.published.issuperset(node.needs):
                    continue
                if rolled_back and not self.running.keys().isdisjoint(node.needs):
                    continue
            del self.running[node.name]
            self.rolled_back.discard(node.name)
            for event in running.job.clear():
                self.run.record(event)
            if not published:
                ending, pause = self.lifecycle.fail(node, running.attempt)
                if pause is None and not rolled_back:
                    self.fail(running, ending)
                continue
            key = decision.key
            if (
                decision.follows
            ):  # its key was unknown when it started; if rolled back, the graph has another stage by now
                key = Artifact.open(node.output).manifest.key if rolled_back else self.lifecycle.decide(node).key
            outdated = self.lifecycle.finalize(node, key, running.attempt)
            self.ran += 1
            self.to_rebuild.pop(node.name, None)
            if self.published.issuperset(node.needs) and not rolled_back:  # no input has been invalidated meanwhile
                self.published.add(node.name)
            self.published.difference_update(outdated)
            self.lifecycle.retain(node, self.published)
            self.apply_gate(node)

    def apply_gate(self, node: Node) -> bool:
        """Carry out a gate's published decision. Returns whether it changes the stages that run after it."""
        decision = decision_after(node)
        if decision is None:
            return False
        if decision.action == "stop":
            self.stopped = decision
            self.order = [other for other in self.order if (other.iteration or 0) <= decision.iteration]
            return True
        if self.stopped is not None and decision.iteration == self.stopped.iteration:  # the gate ran again
            self.stopped, self.order = None, start_order(self.graph, self.config)
        if self.graph.rollbacks.get(node.name) == (decision.start if decision.action == "rollback" else None):
            return False
        last = max(other.iteration or 0 for other in self.graph.nodes.values())
        self.graph.replace_with(placed_graph(self.config, last, self.cluster))
        self.order = start_order(self.graph, self.config)
        # With a lag, artifacts of later iterations may exist that the rollback has outdated: decide about them again.
        later = {other.name for other in self.order if (other.iteration or 0) > decision.iteration}
        self.published -= later
        self.rolled_back = later & self.running.keys()
        # A stage that follows another could wait forever: if its producer fails now, that is not retried.
        for name in self.rolled_back:
            if self.running[name].decision.follows:
                self.running[name].job.cancel()
        return True

    def notify(self) -> None:
        """Pass new events to the listeners, including stages that wait for something."""
        for name, running in self.running.items():
            if text := running.job.news():
                self.run.record(StageWaits(stage=name, text=text))
        self.lifecycle.retention.poll()
        self.broadcast.notify(self.lifecycle.repeated_events())

    def fail(self, running: Running, ending: Ending) -> NoReturn:
        """Stop the run with the reason that the stage left."""
        name, log = running.node.name, log_of(running.attempt)
        program = ["python", "-m", "pipelines"] if sys.argv[0].endswith("__main__.py") else [sys.argv[0]]
        resume = f"Then continue with: {shlex.join([*program, *sys.argv[1:]])}"
        if ending.kind == "user":
            raise UserError(f"stage {name}: {ending.reason}\n  log: {log}\n  {resume}")
        reason = ending.reason or log_tail(running.attempt)
        raise StageFailedError(f"stage {name} {ending.how}\n{reason.rstrip()}\n  log: {log}\n  {resume}", 1)

    def end_running(self) -> None:
        """End the running stages, after a failure or an interrupt. Their partial output is kept."""
        if not self.running:
            return
        grace = self.config.executor.grace_seconds
        try:
            with contextlib.suppress(OSError):
                self.run.record(RunEnding(stages=list(self.running), grace_seconds=grace))
            self.broadcast.notify()
            for running in self.running.values():
                running.job.cancel()
            deadline = time.monotonic() + grace + END_SECONDS
            while any(not running.job.ended() for running in self.running.values()) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        finally:  # also after a second interrupt
            end_orphans(self.run.path)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
