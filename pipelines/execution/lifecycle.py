"""Takes stages through their lifecycle, from the decision about a stage to retention.

    decide      reuse the published output, or run, and why
    act         move the old output aside, or restore the one that fits
    start       an attempt begins
    finalize    an attempt has published
    fail        an attempt has failed: whether and when to retry
    retain      delete and compress what is no longer needed

Both a driver and the jobs of a detached run go through it, on any machine. When a stage may start is up to them.
"""

import contextlib
import functools
import time
from collections.abc import Collection
from pathlib import Path

from contracts.artifacts import Artifact
from contracts.errors import TransientError
from contracts.following import Producer
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
from pipelines.run.superseded import delete_partials, delete_replaced, move_outputs


class Lifecycle:
    """The lifecycle of a run's stages. All state is on disk."""

    def __init__(self, run: RunDirectory, graph: Graph, config: RunConfig) -> None:
        self.run = run
        self.graph = graph
        self.config = config
        self.retries = Retries(config.executor.retries, config.executor.backoff_seconds)
        self.retention = Retention(run, graph, config.retention, config.hub_repos)
        self._repeated: list[Event] = []
        self._profiles: ProfileRecorder | None = ProfileRecorder(graph, config)

    def decide(self, node: Node, rebuild: str | None = None) -> Decision:
        """Decide about a stage whose inputs are published.

        Args:
            rebuild: the reason to rebuild its deleted weights, if something needs them.
        """
        environment = self.config.environments.of(node.environment)
        return decide(node, probe_versions(environment, node.environment), self.run.path, rebuild=rebuild)

    def follow(self, node: Node, maker: Node, decision: Decision) -> Decision:
        """The decision to start a stage while `maker`, the producer of one of its inputs, runs by `decision`."""
        versions = probe_versions(self.config.environments.of(node.environment), node.environment)
        return decide_to_follow(node, versions, maker, Producer(decision.key, decision.hidden_key))

    def act(self, node: Node, decision: Decision) -> None:
        """Move a stage's old output aside before it runs, or reuse the output with the wanted key.

        Raises:
            UserError: the disk has too little space for the estimated output of the stage.
        """
        move_outputs(node, decision, self.run.path)
        if not decision.reuse:
            require_disk_space(node, self.graph, self.config)
            return
        event = StageReused(time=time.time(), stage=node.name, reason=decision.reason, key=decision.key)
        if self._recorded.get(node.name) == decision.key:
            self._repeated.append(event)
        else:  # also if a driver was killed before `finalize`
            delete_partials(node)
            self.run.record(event)

    @functools.cached_property
    def _recorded(self) -> dict[str, str]:
        """The key under which each stage was last published or reused, according to the events."""
        events = [event for event in self.run.events() if isinstance(event, StagePublished | StageReused)]
        return {event.stage: event.key for event in events}

    def repeated_events(self) -> list[Event]:
        """Events that repeat recorded ones and are only shown: stages that are reused once more."""
        events, self._repeated = self._repeated, []
        return events

    def start(self, node: Node, decision: Decision, attempt: Path) -> None:
        """Record that an attempt at a stage begins."""
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
        """Create an attempt with the decision that led to it."""
        attempt = self.run.new_attempt(node.name)
        write_decision(attempt, decision)
        return attempt

    def finalize(self, node: Node, key: str, attempt: Path) -> list[str]:
        """Record that an attempt has published.

        Returns:
            The stages that have to be decided about again, because rebuilt weights differ from those that they read.

        Raises:
            StageFailedError: it was published under another key than asked for.
        """
        artifact = Artifact.open(node.output)
        if artifact.manifest.key != key:
            raise StageFailedError(
                f"stage {node.name} published under the key {artifact.manifest.key[:12]}, but the driver asked for "
                f"{key[:12]}: its code, its environment or an input changed while it ran. Run the same "
                "command again.",
                1,
            )
        delete_partials(node)
        with contextlib.suppress(TransientError):  # the request was deleted
            asked, ran = request_of(attempt).source, artifact.manifest.versions.get("ratchet", "")
            if ran != asked:
                self.run.record(SourceChanged(stage=node.name, asked=asked, ran=ran))
        seconds = round(max(0.0, time.time() - _begun(attempt)), 1)
        ledger = str(artifact.manifest.ledger)
        self.run.record(StagePublished(stage=node.name, key=key, seconds=seconds, ledger=ledger))
        self._profile(node, attempt)
        if (decision := decision_after(node)) is not None and decision.text:
            self.run.record(GateDecided(stage=node.name, action=decision.action, text=decision.text))
        return [] if delete_replaced(node, key, self.run.path) else self._invalidated(node)

    def _profile(self, node: Node, attempt: Path) -> None:
        """Add a stage's timing to the profiles. These only serve predictions: an error is recorded once, and the run
        continues."""
        if self._profiles is None:
            return
        try:
            self._profiles.add(node, attempt, time.time())
        except Exception as error:
            self._profiles = None
            with contextlib.suppress(OSError):  # a full disk ends the run with its own error message
                self.run.record(ListenerFailed(listener="profiles", error=f"{type(error).__name__}: {error}"))

    def _invalidated(self, node: Node) -> list[str]:
        outdated = {node.name}
        for later in self.graph.nodes.values():
            if outdated.intersection(later.needs):
                outdated.add(later.name)
        reason = f"{node.name} differs from what it was before its weights were deleted"
        return self.invalidate([name for name in self.graph.nodes if name in outdated - {node.name}], reason)

    def invalidate(self, stages: list[str], reason: str) -> list[str]:
        """Record that these stages have to be decided about again, if they were published. Returns them."""
        for stage in stages:
            self._recorded.pop(stage, None)
            if (self.graph.nodes[stage].output / MANIFEST).is_file():
                self.run.record(StageInvalidated(stage=stage, reason=reason))
        return stages

    def fail(self, node: Node, attempt: Path) -> tuple[Ending, float | None]:
        """Record a failed attempt. Returns its outcome and the pause before a retry.

        Raises:
            UserError: the disk is full.
        """
        require_space(self.run.path, "directory")
        ending = ending_of(attempt)
        pause = self.retries.pause_after(node.name, ending.kind)
        event = StageFailed(stage=node.name, attempt=attempt.name, kind=ending.kind, how=ending.how, retry_in=pause)
        self.run.record(event)
        return ending, pause

    def affects_retention(self, node: Node) -> bool:
        """Whether retention may delete or compress something now that this stage is published."""
        return may_be_released(node) or node.stage.name in ("evaluation", "checkpoint-evaluation")

    def retain(self, node: Node, published: Collection[str]) -> None:
        """Apply retention after a stage has published."""
        if self.affects_retention(node):
            self.retention.apply(published)


def _begun(attempt: Path) -> float:
    """The time at which an attempt's decision was written."""
    try:
        return (attempt / DECISION).stat().st_mtime
    except FileNotFoundError:  # the logs were deleted
        return time.time()
