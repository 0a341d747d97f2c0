"""The lifecycle of a stage, from the decision about it to retention.

    decide      reuse what is published, or run, and why
    act         make way for what it is to publish, or take back what fits
    start       an attempt begins
    finalize    an attempt has published
    fail        an attempt has not: whether there is another one, and when
    retain      delete and compress what is not needed any more

A driver that watches and the jobs of a detached run both go through this, on whichever machine they are; who waits for
whom is their own affair.
"""

import contextlib
import functools
import time
from collections.abc import Collection
from pathlib import Path

from contracts.artifacts import Artifact
from contracts.errors import TransientError
from contracts.following import Maker
from contracts.manifest import MANIFEST
from contracts.stage import require_space
from pipelines.config.run import RunConfig
from pipelines.environments.launch import probe_versions
from pipelines.execution.attempts import (
    Retries,
    StageFailedError,
    require_disk_space,
    write_decision,
)
from pipelines.execution.endings import Ending, ending_of
from pipelines.execution.profiling import ProfileRecorder
from pipelines.execution.supervisor import DECISION, request_of
from pipelines.graph import Graph, Node
from pipelines.run.decisions import Decision, decide, decide_to_follow
from pipelines.run.directory import RunDirectory
from pipelines.run.events import (
    Event,
    GateDecided,
    ListenerFailed,
    SourceChanged,
    StageFailed,
    StageInvalidated,
    StagePublished,
    StageReused,
    StageStarted,
)
from pipelines.run.gates import decision_after
from pipelines.run.retention import Retention, may_be_released
from pipelines.run.superseded import act_on, drop_partials, drop_replaced


class Lifecycle:
    """The lifecycle of a run's stages. All state is on the disk."""

    def __init__(self, run: RunDirectory, graph: Graph, config: RunConfig) -> None:
        self.run = run
        self.graph = graph
        self.config = config
        self.retries = Retries(config.executor.retries, config.executor.backoff_seconds)
        self.retention = Retention(run, graph, config.retention, config.pushes)
        self._untold: list[Event] = []
        self._profiles: ProfileRecorder | None = ProfileRecorder(graph, config)

    def decide(self, node: Node, again: str | None = None) -> Decision:
        """Decide about a stage whose inputs are published.

        Args:
            again: why its weights are to be made again, where these were deleted.
        """
        environment = self.config.environments.of(node.environment)
        return decide(node, probe_versions(environment, node.environment), self.run.path, again=again)

    def follow(self, node: Node, maker: Node, decision: Decision) -> Decision:
        """The decision to start a stage beside the maker of one of its inputs, about which was decided before."""
        versions = probe_versions(self.config.environments.of(node.environment), node.environment)
        return decide_to_follow(node, versions, maker, Maker(decision.key, decision.hidden_key))

    def act(self, node: Node, decision: Decision) -> None:
        """Move the old output of a stage aside before it runs, or reuse an output with the wanted key.

        Raises:
            UserError: the disk has no room for what the stage is estimated to write.
        """
        act_on(node, decision, self.run.path)
        if not decision.reuse:
            require_disk_space(node, self.graph, self.config)
            return
        event = StageReused(time=time.time(), stage=node.name, reason=decision.reason, key=decision.key)
        if self._recorded.get(node.name) == decision.key:
            self._untold.append(event)
        else:  # also after a driver that was killed between a stage's end and what it does then
            drop_partials(node)
            self.run.record(event)

    @functools.cached_property
    def _recorded(self) -> dict[str, str]:
        """The key under which each stage is published, by the recorded events."""
        events = [event for event in self.run.events() if isinstance(event, StagePublished | StageReused)]
        return {event.stage: event.key for event in events}

    def untold(self) -> list[Event]:
        """Events that say nothing new and are not recorded: stages that are reused once more."""
        events, self._untold = self._untold, []
        return events

    def start(self, node: Node, decision: Decision, attempt: Path) -> None:
        """An attempt at a stage begins."""
        where = node.placement
        event = StageStarted(
            stage=node.name,
            reason=decision.reason,
            key="" if decision.follows else decision.key,
            attempt=attempt.name,
            pool=where.pool if where is not None else "",
            devices=list(where.devices) if where is not None and where.exclusive else None,
        )
        self.run.record(event)

    def begin_attempt(self, node: Node, decision: Decision) -> Path:
        """A new attempt, with what was decided before it."""
        attempt = self.run.new_attempt(node.name)
        write_decision(attempt, decision)
        return attempt

    def finalize(self, node: Node, key: str, attempt: Path) -> list[str]:
        """Record that an attempt has published.

        Returns:
            The stages that may come out differently now: those after one whose deleted weights were made again, and
            are other ones than before.

        Raises:
            StageFailedError: it is something else than was asked for.
        """
        artifact = Artifact.open(node.output)
        if artifact.manifest.key != key:
            raise StageFailedError(
                f"stage {node.name} published under the key {artifact.manifest.key[:12]}, but the driver asked for "
                f"{key[:12]}: its code, its environment or an input changed while it ran. The same command decides "
                "anew.",
                1,
            )
        drop_partials(node)
        with contextlib.suppress(TransientError):  # the logs were deleted, and nobody knows what was asked for
            asked, ran = request_of(attempt).source, artifact.manifest.versions.get("ratchet", "")
            if ran != asked:
                self.run.record(SourceChanged(stage=node.name, asked=asked, ran=ran))
        seconds = round(max(0.0, time.time() - _begun(attempt)), 1)
        ledger = str(artifact.manifest.ledger)
        self.run.record(StagePublished(stage=node.name, key=key, seconds=seconds, ledger=ledger))
        self._profile(node, attempt)
        if (decision := decision_after(node)) is not None and decision.text:
            self.run.record(GateDecided(stage=node.name, action=decision.action, text=decision.text))
        return [] if drop_replaced(node, key, self.run.path) else self._invalidated(node)

    def _profile(self, node: Node, attempt: Path) -> None:
        """Add what a stage took to the profiles, which are for predictions alone: where that fails it is told once, and
        the run goes on."""
        if self._profiles is None:
            return
        try:
            self._profiles.add(node, attempt, time.time())
        except Exception as error:
            self._profiles = None
            with contextlib.suppress(OSError):  # a full disk ends the run by itself, with its own words
                self.run.record(ListenerFailed(listener="profiles", error=f"{type(error).__name__}: {error}"))

    def _invalidated(self, node: Node) -> list[str]:
        outdated = {node.name}
        for later in self.graph.nodes.values():
            if outdated.intersection(later.needs):
                outdated.add(later.name)
        reason = f"{node.name} differs from what it was before its weights were deleted"
        return self.invalidate([name for name in self.graph.nodes if name in outdated - {node.name}], reason)

    def invalidate(self, stages: list[str], reason: str) -> list[str]:
        """These stages are to be decided about once more, as far as they were published; returns them."""
        for stage in stages:
            self._recorded.pop(stage, None)
            if (self.graph.nodes[stage].output / MANIFEST).is_file():
                self.run.record(StageInvalidated(stage=stage, reason=reason))
        return stages

    def fail(self, node: Node, attempt: Path) -> tuple[Ending, float | None]:
        """Record a failed attempt: how it ended, and the pause before a retry.

        Raises:
            UserError: the disk is full.
        """
        require_space(self.run.path, "directory")
        ending = ending_of(attempt)
        pause = self.retries.pause_after(node.name, ending.kind)
        event = StageFailed(stage=node.name, attempt=attempt.name, kind=ending.kind, how=ending.how, retry_in=pause)
        self.run.record(event)
        return ending, pause

    def concerns_retention(self, node: Node) -> bool:
        """Whether something may go, now that a stage is published."""
        return may_be_released(node) or node.stage.name in ("evaluation", "checkpoint-evaluation")

    def retain(self, node: Node, published: Collection[str]) -> None:
        """Apply retention after a stage has published."""
        if self.concerns_retention(node):
            self.retention.apply(published)


def _begun(attempt: Path) -> float:
    """When an attempt began: when its decision was written."""
    try:
        return (attempt / DECISION).stat().st_mtime
    except FileNotFoundError:  # somebody has deleted the logs
        return time.time()
