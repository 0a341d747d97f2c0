"""Defines, records and reads the events of a run, a stream of typed records: events.jsonl in its directory.

Whatever drives the run (a driver, the jobs of a detached run, a command) appends; everything that shows a run reads:
the live table, `status`, reports, listeners. Readers change nothing in the run. A new kind of event is a class here;
its wording is in pipelines/insight/event_text.py.
"""

import time
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from contracts.tailing import appending, complete_lines

FILE = "events.jsonl"


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    """Base class of events."""

    time: float = 0.0
    """Seconds since 1970; set when the event is recorded."""


class RunStarted(Event, frozen=True, tag="run started"):
    """A command has begun to work on the run."""

    stages: int
    """Number of stages for the iterations asked for."""
    by: str
    """Process and machine."""


class RunEnding(Event, frozen=True, tag="run ending"):
    """The stages that still run were asked to stop."""

    stages: list[str]
    grace_seconds: float


class RunEnded(Event, frozen=True, tag="run ended"):
    """No process works on the run any more: everything is published, or it stopped early."""

    outcome: Literal["finished", "failed", "interrupted", "stopped"]
    """`stopped`: by a gate."""


class RunCancelled(Event, frozen=True, tag="cancelled"):
    """`pipeline cancel` has ended the run's jobs."""

    jobs: list[str]
    by: str


class OrphanEnded(Event, frozen=True, tag="orphan ended"):
    """A process left by a killed driver was ended."""

    pid: int


class StageEvent(Event, frozen=True):
    """Base class of events about one stage."""

    stage: str
    """The node's name."""


class StageReused(StageEvent, frozen=True, tag="reused"):
    """A published output has the wanted key, so that the stage does not run."""

    reason: str
    key: str


class StageSubmitted(StageEvent, frozen=True, tag="submitted"):
    """A stage of a detached run was submitted to the scheduler."""

    attempt: str
    jobs: list[str]


class StageStarted(StageEvent, frozen=True, tag="started"):
    """An attempt at a stage has begun."""

    reason: str
    key: str
    """Empty for a stage that follows another: its key is known only when the other has published."""
    attempt: str
    pool: str = ""
    """The pool that its devices belong to, if the plan has several."""
    devices: list[int] | None = None
    """This machine's devices that it has exclusively; None: shared, or chosen by a scheduler."""


class StageWaits(StageEvent, frozen=True, tag="waits"):
    """A started stage waits for something that may take long."""

    text: str


class StagePublished(StageEvent, frozen=True, tag="published"):
    """An attempt has published the stage's output."""

    key: str
    seconds: float = 0.0
    """Seconds since the attempt began."""
    ledger: str = ""
    """The output's ledger in words."""


class GateDecided(StageEvent, frozen=True, tag="gate"):
    """Gates have warned about a policy, stopped the run or rolled it back."""

    action: Literal["go on", "stop", "rollback"]
    text: str
    """One sentence per gate that was triggered."""


class StageFailed(StageEvent, frozen=True, tag="failed"):
    """An attempt has ended without publishing."""

    attempt: str
    kind: str
    """Kind of failure: user, transient, error, stopped."""
    how: str
    retry_in: float | None
    """Seconds until the next attempt; None if there is none."""


class StageInvalidated(StageEvent, frozen=True, tag="invalidated"):
    """A published stage has to be decided about again."""

    reason: str


class SourceChanged(StageEvent, frozen=True, tag="source changed"):
    """A stage ran with other source code than at the time of its request."""

    asked: str
    ran: str


class JobEnded(StageEvent, frozen=True, tag="job ended"):
    """A job of a stage has ended abnormally, according to the scheduler's accounting."""

    job: str
    text: str
    """The ending in words."""
    ended: float | None = None
    """Seconds since 1970, if known."""
    requeued: bool = False
    cancelled: bool = False


class JobRequeued(StageEvent, frozen=True, tag="requeue"):
    """A job has saved its state and asked to be requeued."""

    job: str
    host: str
    reason: str


class JobRestarted(StageEvent, frozen=True, tag="restart"):
    """The process of a job ended before its work was done and was started again."""

    job: str
    host: str
    code: str


class WeightsReleased(StageEvent, frozen=True, tag="release"):
    """Retention has deleted a checkpoint's weights."""

    bytes: int
    reason: str


class RowsCompressed(StageEvent, frozen=True, tag="compress"):
    """Retention has compressed a stage's rows."""

    bytes: int


class RetentionHeld(Event, frozen=True, tag="retention held"):
    """Retention is suspended on purpose."""

    reason: str


class RetentionFailed(Event, frozen=True, tag="retention failed"):
    """A step of retention failed; the run continues."""

    what: str
    error: str


class HubPushed(Event, frozen=True, tag="pushed"):
    """Something was pushed to the Hub, or is there already with the same content."""

    repo: str
    kind: Literal["model", "dataset"]
    what: str
    """The tag (iteration-3), or "report"."""
    commit: str


class HubPushFailed(Event, frozen=True, tag="push failed"):
    """A push to the Hub failed; the run continues. Not repeated for the same error, nor for further transient ones."""

    repo: str
    kind: Literal["model", "dataset"]
    what: str
    error: str
    lasts: bool
    """Whether the user has to act; otherwise it is retried."""


class Collected(Event, frozen=True, tag="gc"):
    """`pipeline gc` has deleted or compressed something."""

    verb: str
    path: str
    bytes: int
    reason: str


class ListenerFailed(Event, frozen=True, tag="listener failed"):
    """A listener failed and is not called again; the run continues."""

    listener: str
    error: str


class TrackerFailed(Event, frozen=True, tag="tracker failed"):
    """A tracker failed and gets no more metrics from this command; the run continues."""

    tracker: str
    error: str


class HookFailed(Event, frozen=True, tag="hook failed"):
    """A user's hook failed for the first time in this command; the run continues."""

    hook: str
    error: str


class Unreadable(Event, frozen=True, tag="unreadable"):
    """A line that is not an event of this version: torn by a crash, or written by another version or program."""


AnyEvent: TypeAlias = (
    RunStarted | RunEnding | RunEnded | RunCancelled | OrphanEnded | StageReused | StageSubmitted | StageStarted
    | StageWaits | StagePublished | StageFailed | StageInvalidated | SourceChanged | JobEnded | JobRequeued
    | JobRestarted | WeightsReleased | RowsCompressed | RetentionHeld | RetentionFailed | Collected | ListenerFailed
    | HubPushed | HubPushFailed | GateDecided
    | TrackerFailed | HookFailed
)  # fmt: skip
_DECODER: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


class EventStream:
    """The events of a run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Event) -> None:
        """Record an event; several machines may do so at once."""
        event = msgspec.structs.replace(event, time=round(time.time(), 3))
        with appending(self.path) as file:
            file.write(msgspec.json.encode(event) + b"\n")

    def drop_torn_line(self) -> None:
        """Remove the incomplete last line that a killed process left, so that other programs can read the file."""
        if self.path.exists():
            with appending(self.path):
                pass

    def read(self) -> list[Event]:
        """All events, in order."""
        return EventReader(self.path).news()


def pushed_to_hub(events: list[Event]) -> set[tuple[str, str]]:
    """Pairs of repo and tag (or "report") that the events record as pushed."""
    return {(event.repo, event.what) for event in events if isinstance(event, HubPushed)}


class EventReader:
    """Reads a run's events incrementally."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def news(self) -> list[Event]:
        """The events since the last call; a line that is still being written is returned by a later call."""
        content = complete_lines(self._path, self._offset)
        self._offset += len(content)
        return decode_events(content)


def decode_events(content: bytes) -> list[Event]:
    """Parse the lines of events.jsonl."""
    return [_decoded(line) for line in content.splitlines() if line.strip()]


def _decoded(line: bytes) -> Event:
    try:
        return _DECODER.decode(line)
    except (ValueError, RecursionError):
        return Unreadable()
