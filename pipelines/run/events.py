"""What happens in a run, as one stream of typed events: events.jsonl in its directory.

Whoever drives the run (a driver, the jobs of a detached run, a command) appends; everything that tells of a run reads:
the live table, `status`, reports, listeners. Readers never touch the run. A new kind of event is a class here; its
words are in pipelines/insight/wording.py.
"""

import time
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from contracts.tailing import appending, whole_lines

FILE = "events.jsonl"


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    """Something that happened."""

    time: float = 0.0
    """When, in seconds since 1970; filled in when it is recorded."""


class RunStarted(Event, frozen=True, tag="run started"):
    """A command begins to work on the run."""

    stages: int
    """How many stages the run has for the iterations that are asked for."""
    by: str
    """Process and machine."""


class RunEnding(Event, frozen=True, tag="run ending"):
    """The stages that still run are asked to stop."""

    stages: list[str]
    grace_seconds: float


class RunEnded(Event, frozen=True, tag="run ended"):
    """Nobody works on the run from now on: everything is published, or it stops where it is."""

    outcome: Literal["finished", "failed", "interrupted", "stopped"]
    """Stopped: by a gate."""


class RunCancelled(Event, frozen=True, tag="cancelled"):
    """`pipeline cancel` has ended the run's jobs."""

    jobs: list[str]
    by: str


class OrphanEnded(Event, frozen=True, tag="orphan ended"):
    """A process that a killed driver had left was ended."""

    pid: int


class StageEvent(Event, frozen=True):
    """Something that happened to a stage."""

    stage: str
    """Its name."""


class StageReused(StageEvent, frozen=True, tag="reused"):
    """What is published already is what is asked for."""

    reason: str
    key: str


class StageSubmitted(StageEvent, frozen=True, tag="submitted"):
    """A stage of a detached run was handed to the scheduler."""

    attempt: str
    jobs: list[str]


class StageStarted(StageEvent, frozen=True, tag="started"):
    """An attempt at a stage begins."""

    reason: str
    key: str
    """Empty where it follows another stage, because it is known only when that has published."""
    attempt: str
    pool: str = ""
    """The pool of devices that it was given a part of, where the plan has several."""
    devices: list[int] | None = None
    """The devices of this machine that it has for itself; None: it shares them, or a scheduler chooses."""


class StageWaits(StageEvent, frozen=True, tag="waits"):
    """A stage that was started waits for something that may take long."""

    text: str


class StagePublished(StageEvent, frozen=True, tag="published"):
    """An attempt has published what the stage makes."""

    key: str
    seconds: float = 0.0
    """Since the attempt began."""
    ledger: str = ""
    """What became of the rows, in words."""


class GateDecided(StageEvent, frozen=True, tag="gate"):
    """Gates have something to say of a policy."""

    action: Literal["go on", "stop", "rollback"]
    text: str
    """A sentence for each gate that has."""


class StageFailed(StageEvent, frozen=True, tag="failed"):
    """An attempt has ended without publishing."""

    attempt: str
    kind: str
    """Whose fault it was: user, transient, error, stopped."""
    how: str
    retry_in: float | None
    """Seconds until the next attempt; None: there is none."""


class StageInvalidated(StageEvent, frozen=True, tag="invalidated"):
    """A stage that was published already is to be decided about once more."""

    reason: str


class SourceChanged(StageEvent, frozen=True, tag="source changed"):
    """A stage was made by other source code than when it was asked for."""

    asked: str
    ran: str


class JobEnded(StageEvent, frozen=True, tag="job ended"):
    """A job of a stage has ended otherwise than well, as the scheduler's accounting tells."""

    job: str
    text: str
    """What happened, in words."""
    ended: float | None = None
    """When, in seconds since 1970, where that is known."""
    requeued: bool = False
    cancelled: bool = False


class JobRequeued(StageEvent, frozen=True, tag="requeue"):
    """A job has saved what it had and asked for another start."""

    job: str
    host: str
    reason: str


class JobRestarted(StageEvent, frozen=True, tag="restart"):
    """The process of a job ended before it had finished its work, and was started again."""

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
    """Retention does nothing, on purpose."""

    reason: str


class RetentionFailed(Event, frozen=True, tag="retention failed"):
    """Something of retention failed; the run goes on."""

    what: str
    error: str


class HubPushed(Event, frozen=True, tag="pushed"):
    """Something is on the Hub, and the same as here."""

    repo: str
    kind: Literal["model", "dataset"]
    what: str
    """The tag (iteration-3), or "report"."""
    commit: str


class HubPushFailed(Event, frozen=True, tag="push failed"):
    """Something is not on the Hub; the run goes on. Told once as long as nothing changes."""

    repo: str
    kind: Literal["model", "dataset"]
    what: str
    error: str
    lasts: bool
    """Whether somebody has to do something; else it is tried again."""


class Collected(Event, frozen=True, tag="gc"):
    """`pipeline gc` has deleted or compressed something."""

    verb: str
    path: str
    bytes: int
    reason: str


class ListenerFailed(Event, frozen=True, tag="listener failed"):
    """A listener failed and is not told any more; the run goes on."""

    listener: str
    error: str


class TrackerFailed(Event, frozen=True, tag="tracker failed"):
    """A tracker gets nothing more from this command; the run goes on."""

    tracker: str
    error: str


class HookFailed(Event, frozen=True, tag="hook failed"):
    """A hook of the user's has failed, for the first time since the command began; the run goes on."""

    hook: str
    error: str


class Unreadable(Event, frozen=True, tag="unreadable"):
    """A line that is no event of this version: left by a crash, by another version, or by somebody else."""


AnyEvent: TypeAlias = (
    RunStarted | RunEnding | RunEnded | RunCancelled | OrphanEnded | StageReused | StageSubmitted | StageStarted
    | StageWaits | StagePublished | StageFailed | StageInvalidated | SourceChanged | JobEnded | JobRequeued
    | JobRestarted | WeightsReleased | RowsCompressed | RetentionHeld | RetentionFailed | Collected | ListenerFailed
    | HubPushed | HubPushFailed | GateDecided
    | TrackerFailed | HookFailed
)  # fmt: skip
_DECODER: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


class EventStream:
    """The events of a run, on its disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Event) -> None:
        """Record an event, also beside other machines that do."""
        event = msgspec.structs.replace(event, time=round(time.time(), 3))
        with appending(self.path) as file:
            file.write(msgspec.json.encode(event) + b"\n")

    def drop_torn_line(self) -> None:
        """Cut off the line that a killed process was writing, for whoever reads the file."""
        if self.path.exists():
            with appending(self.path):
                pass

    def read(self) -> list[Event]:
        """All of them, in order."""
        return EventReader(self.path).news()


def on_hub(events: list[Event]) -> set[tuple[str, str]]:
    """What a run's events say is on the Hub: repos, and what of the run is there."""
    return {(event.repo, event.what) for event in events if isinstance(event, HubPushed)}


class EventReader:
    """Reads a run's events as they come."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def news(self) -> list[Event]:
        """The events since the last call; a line that is still being written comes with the next."""
        content = whole_lines(self._path, self._offset)
        self._offset += len(content)
        return decode_events(content)


def decode_events(content: bytes) -> list[Event]:
    """The lines of events.jsonl."""
    return [_decoded(line) for line in content.splitlines() if line.strip()]


def _decoded(line: bytes) -> Event:
    try:
        return _DECODER.decode(line)
    except (ValueError, RecursionError):
        return Unreadable()
