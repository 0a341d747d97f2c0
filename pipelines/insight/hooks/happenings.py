"""Turns a run's events and points into happenings: the plain data that hooks are called with.

Every happening has `kind` and `time` (seconds since 1970); those of stages and runs have `what`.

    run         what: started, finished, failed, stopped, interrupted, cancelled
    stage       what: started, published, failed; stage, and further fields of its event
    iteration   a policy is evaluated: iteration, policy, metrics
    step        an optimizer step: stage, iteration, step, global_step, metrics
    shard       a shard of rows: stage, iteration, shard, metrics
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.points import KEY_LENGTH, Point
from pipelines.insight.hooks.task import EvaluatedPolicy
from pipelines.run.events import (
    FILE,
    Event,
    EventReader,
    RunCancelled,
    RunEnded,
    RunStarted,
    StageFailed,
    StagePublished,
    StageReused,
    StageStarted,
)

Happening: TypeAlias = dict[str, Any]


class Happenings:
    """Makes happenings from a run's events. It has to see all of them in order, since some depend on earlier ones."""

    def __init__(self, run: Path, evaluated: list[EvaluatedPolicy]) -> None:
        self._run = run
        self._evaluated = {stage: policy for policy in evaluated for stage in policy.stages}
        self._started: dict[str, str] = {}
        self._made: set[str] = set()

    def of(self, event: Event) -> Iterator[Happening]:
        """The happenings of an event, without the fields that `complete` adds."""
        match event:
            case RunStarted():
                yield {"kind": "run", "what": "started", "time": event.time, "stages": event.stages, "by": event.by}
            case RunEnded():
                yield {"kind": "run", "what": event.outcome, "time": event.time}
            case RunCancelled():
                yield {"kind": "run", "what": "cancelled", "time": event.time, "by": event.by}
            case StageStarted():
                self._started[event.stage] = event.key
                self._made.discard(event.stage)
                yield _stage_happening(event.stage, "started", event.time, reason=event.reason, attempt=event.attempt)
            case StageFailed():
                self._started.pop(event.stage, None)
                fields = {"attempt": event.attempt, "failure": event.kind, "how": event.how, "retry_in": event.retry_in}
                yield _stage_happening(event.stage, "failed", event.time, **fields)
            case StagePublished():
                fields = {"key": event.key, "seconds": event.seconds, "ledger": event.ledger}
                yield from self._published(event.stage, event.time, **fields)
            case StageReused(stage=stage):
                # The stage was published while no driver was there to record it: the driver had been killed.
                if self._started.get(stage) in ("", event.key):
                    yield from self._published(stage, event.time, key=event.key)
                self._made.add(stage)

    def _published(self, stage: str, time: float, **fields: Any) -> Iterator[Happening]:
        self._started.pop(stage, None)
        self._made.add(stage)
        yield _stage_happening(stage, "published", time, **fields)
        policy = self._evaluated.get(stage)
        if policy is not None and self._made.issuperset(policy.stages):
            yield {"kind": "iteration", "time": time, "iteration": policy.iteration, "policy": policy.policy}

    def complete(self, happening: Happening) -> Happening:
        """Add what is read from published artifacts: their directories and metrics."""
        if happening["kind"] == "stage" and happening["what"] == "published":
            stage = happening["stage"]
            return {**happening, "path": str(self._run / stage), "metrics": self._metrics(stage)}
        if happening["kind"] == "iteration":
            (policy,) = {
                policy.iteration: policy
                for policy in self._evaluated.values()
                if policy.iteration == happening["iteration"]
            }.values()
            metrics = {
                f"{prefix}{name}": value
                for stage, prefix in policy.stages.items()
                for name, value in self._metrics(stage).items()
            }
            return {**happening, "metrics": metrics}
        return happening

    def _metrics(self, stage: str) -> dict[str, Any]:
        """The metrics in a stage's manifest; empty while the stage is being recomputed."""
        try:
            found: dict[str, Any] = Artifact.open(self._run / stage).manifest.facts.get("metrics", {})
        except UserError:
            return {}
        return found


class OwnStages:
    """The stages that this run has computed, as opposed to artifacts that it has reused from other runs."""

    def __init__(self, run: Path) -> None:
        self._events = EventReader(run / FILE)
        self._stages: set[tuple[str, str]] = set()

    def computed(self, point: Point) -> bool:
        """Whether a point comes from a stage of this run. A stage's start is recorded before its first point."""
        if (found := (point.stage, point.key)) not in self._stages:
            started = (event for event in self._events.news() if isinstance(event, StageStarted | StagePublished))
            self._stages.update((event.stage, event.key[:KEY_LENGTH]) for event in started)
        return found in self._stages


def point_happening(point: Point) -> Happening | None:
    """The happening of a point; None for a point of a whole stage, for which there is an event."""
    if point.unit == "stage":
        return None
    fields: Happening = {"kind": point.unit, "time": point.time, "stage": point.stage, "iteration": point.iteration}
    fields[point.unit] = point.number
    return {**fields, "global_step": point.global_step, "metrics": dict(point.metrics)}


def in_words(happening: Happening) -> str:
    """A short name of a happening, for a message."""
    match happening["kind"]:
        case "run":
            return f"the run: {happening['what']}"
        case "stage":
            return f"stage {happening['stage']}: {happening['what']}"
        case "iteration":
            return f"iteration {happening['iteration']}"
        case kind:
            return f"{kind} {happening[kind]} of {happening['stage']}"


def _stage_happening(stage: str, what: str, time: float, **fields: Any) -> Happening:
    return {"kind": "stage", "what": what, "time": time, "stage": stage, **fields}
