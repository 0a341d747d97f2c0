"""Pushing a run: every parcel once, in order, with what became of it told in the run's events."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from contracts.locks import locked
from pipelines.config.sections import HubSection
from pipelines.hub.failures import PushError, persistently
from pipelines.hub.parcels import REPORT, Kind, Parcel, parcels, report_files
from pipelines.hub.remote import Remote
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, HubPushed, HubPushFailed, on_hub

SCRATCH = ".hub"
"""Directory in a run's with what is made only to be pushed, and the lock of who pushes."""


@dataclass(frozen=True)
class Pushed:
    """What became of something that was to be pushed."""

    repo: str
    kind: Kind
    what: str
    state: Literal["on the Hub", "would be pushed", "failed"]
    commit: str | None = None
    error: str | None = None
    lasts: bool = False
    """Whether the failure stays until somebody does something."""

    def as_data(self) -> dict[str, Any]:
        """For --json."""
        return {name: value for name, value in asdict(self).items() if name != "lasts" and value is not None}


class Pusher:
    """Pushes one run. Only one of them works at a time; what it knows is on the Hub and in the run's events."""

    def __init__(self, run: RunDirectory, section: HubSection) -> None:
        self.run = run
        self.section = section
        self.scratch = run.path / SCRATCH

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for others who push this run, and keep them waiting."""
        self.scratch.mkdir(exist_ok=True)
        with locked(self.scratch / "lock"):
            for left in self.scratch.glob("tmp*"):
                shutil.rmtree(left)
            yield

    def push(self, *, only: int | None = None, known: bool = False) -> Iterator[Pushed]:
        """Have on the Hub whatever is ready; after something failed in a repo, nothing more is pushed to it.

        Args:
            only: this iteration alone.
            known: leave out what the events say is there; else the Hub itself is asked.
        """
        failed: set[str] = set()
        there = on_hub(self.run.events()) if known else set()
        for parcel in parcels(self.run, self.section, self.run.iterations):
            if parcel.repo in failed or only not in (None, parcel.iteration) or (parcel.repo, parcel.tag) in there:
                continue
            found = self._persistently(parcel)
            if found.state == "failed":
                failed.add(parcel.repo)
            yield found

    def report(self) -> Iterator[Pushed]:
        """Have the run's report on the Hub, if there is one, beside what was pushed before."""
        repo, kind = first_repo(self.section)
        files = report_files(self.run)
        if not self.section.report or not files:
            return
        remote = Remote(repo, kind)
        try:
            title = f"{self.run.path.name}: report"
            commit = persistently(lambda: remote.push_report(files, title), repo, self.section.patience_seconds)
        except PushError as error:
            yield self._told(Pushed(repo, kind, REPORT, "failed", error=str(error), lasts=error.failure.lasts))
            return
        if commit is not None:
            yield self._told(Pushed(repo, kind, REPORT, "on the Hub", commit))

    def plan(self, *, only: int | None = None) -> Iterator[Pushed]:
        """What `push` would do; nothing is written anywhere."""
        for parcel in parcels(self.run, self.section, self.run.iterations):
            if only in (None, parcel.iteration):
                yield self._planned(parcel)

    def _persistently(self, parcel: Parcel) -> Pushed:
        remote, place = Remote(parcel.repo, parcel.kind), (parcel.repo, parcel.kind, parcel.tag)
        private, patience = self.section.private, self.section.patience_seconds
        try:
            commit = persistently(
                lambda: remote.push(parcel, self.scratch, private=private),
                parcel.repo,
                patience,
                lambda failure: self._told(Pushed(*place, "failed", error=failure.text)),
            )
        except PushError as error:
            return self._told(Pushed(*place, "failed", error=str(error), lasts=error.failure.lasts))
        return self._told(Pushed(*place, "on the Hub", commit))

    def _planned(self, parcel: Parcel) -> Pushed:
        remote = Remote(parcel.repo, parcel.kind)

        def ask() -> str | None:
            head = remote.head()
            return remote.find(parcel, head)[0] if head is not None else None

        place = (parcel.repo, parcel.kind, parcel.tag)
        try:
            commit = persistently(ask, parcel.repo, self.section.patience_seconds)
        except PushError as error:
            return Pushed(*place, "failed", error=str(error), lasts=error.failure.lasts)
        return Pushed(*place, "on the Hub" if commit else "would be pushed", commit)

    def _told(self, found: Pushed) -> Pushed:
        """Record what is news."""
        event: HubPushed | HubPushFailed
        if found.state == "failed":
            event = HubPushFailed(
                repo=found.repo, kind=found.kind, what=found.what, error=found.error or "", lasts=found.lasts
            )
        else:
            event = HubPushed(repo=found.repo, kind=found.kind, what=found.what, commit=found.commit or "")
        if not _is_known(event, self.run.events()):
            with contextlib.suppress(OSError):  # a full disk, which the run itself tells
                self.run.record(event)
        return found


def first_repo(section: HubSection) -> tuple[str, Kind]:
    """Where the report goes."""
    if section.model is not None:
        return section.model, "model"
    return section.pairs or section.rollouts or "", "dataset"


def _is_known(event: HubPushed | HubPushFailed, events: list[Event]) -> bool:
    """Whether the last thing that was told about the same is the same."""
    for other in reversed(events):
        if isinstance(other, HubPushed | HubPushFailed) and (other.repo, other.what) == (event.repo, event.what):
            if isinstance(event, HubPushed):
                return isinstance(other, HubPushed) and other.commit == event.commit
            if isinstance(other, HubPushed):
                return False
            return other.error == event.error or not (other.lasts or event.lasts)
    return False
