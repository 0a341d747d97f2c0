"""Pushes a run's uploads to the Hub, each once and in order, and records the outcomes in the run's events."""

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from contracts.errors import UserError
from contracts.locks import locked, try_lock
from pipelines.config.sections import HubSection
from pipelines.hub.failures import Failure, PushError, persistently
from pipelines.hub.parcels import LOG, REPORT, Kind, Parcel, parcels, report_files
from pipelines.hub.parquet import RolloutsWriter
from pipelines.hub.remote import Remote
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, HubPushed, HubPushFailed, pushed_to_hub

PLAN_SECONDS = 10.0
"""Seconds for which `--dry-run` retries a Hub that does not answer."""
SCRATCH = ".hub"
"""Subdirectory of a run for files that exist only to be uploaded, and for the lock of the process that pushes."""


@dataclass(frozen=True)
class Pushed:
    """The outcome for one upload, or for the report."""

    repo: str
    kind: Kind
    what: str
    state: Literal["on the Hub", "would be pushed", "failed"]
    commit: str | None = None
    error: str | None = None
    lasts: bool = False
    """Whether the failure is permanent: no retry succeeds until somebody fixes the cause."""

    def as_data(self) -> dict[str, Any]:
        """The fields that `--json` prints."""
        return {name: value for name, value in asdict(self).items() if name != "lasts" and value is not None}


class Pusher:
    """Pushes one run. One process pushes at a time; its only state is on the Hub and in the run's events."""

    def __init__(self, run: RunDirectory, section: HubSection, patience: Callable[[], float] | None = None) -> None:
        """`patience` returns for how many seconds to retry a request; by default the section's `patience_seconds`."""
        self.trouble: Callable[[Failure], object] = lambda failure: None
        """Called with the first failure of a request, at once, for callers that a user is watching."""
        self.run = run
        self.section = section
        self.patience = patience or (lambda: section.patience_seconds)
        self.scratch = run.path / SCRATCH
        self.failed: set[str] = set()  # repos, in the last pass
        self._writer = RolloutsWriter(run)

    @contextlib.contextmanager
    def alone(self, *, wait: bool = True) -> Iterator[None]:
        """Hold the lock that lets only one process push this run.

        Raises:
            UserError: another process holds the lock, and `wait` is false.
        """
        self.scratch.mkdir(exist_ok=True)
        with contextlib.ExitStack() as held:
            if wait:
                held.enter_context(locked(self.scratch / "lock"))
            elif not try_lock(held.enter_context((self.scratch / "lock").open("a+")), fcntl.LOCK_EX):
                raise UserError(
                    f"{self.run.path} is being pushed right now by another process (its log is {LOG}). `pipeline "
                    "status` shows how it goes, and --dry-run what is on the Hub."
                )
            for left in self.scratch.glob("tmp*"):
                shutil.rmtree(left)
            held.callback(self._writer.close)
            yield

    def push(self, *, only: int | None = None, known: bool = False) -> Iterator[Pushed]:
        """Push everything that is ready; after a failure in a repo, nothing more is pushed to that repo.

        Args:
            only: push this iteration alone.
            known: skip what is on the Hub according to the run's events; otherwise the Hub itself is asked.
        """
        self.failed.clear()
        there = pushed_to_hub(self.run.events()) if known else set()
        for parcel in parcels(self.run, self.section, self._writer):
            if parcel.repo in self.failed or only not in (None, parcel.iteration) or (parcel.repo, parcel.tag) in there:
                continue
            found = self._persistently(parcel)
            if found.state == "failed":
                self.failed.add(parcel.repo)
            yield found

    def report(self) -> Iterator[Pushed]:
        """Push the run's report, if there is one, to a repo that has uploads already."""
        repo, kind = first_repo(self.section)
        files = report_files(self.run)
        if not self.section.report or not files or repo in self.failed:
            return
        remote = Remote(repo, kind)
        try:
            title = f"{self.run.path.name}: report"
            commit = persistently(lambda: remote.push_report(files, title), repo, self.patience, at_once=self.trouble)
        except PushError as error:
            yield self._told(Pushed(repo, kind, REPORT, "failed", error=str(error), lasts=error.failure.lasts))
            return
        if commit is not None:
            yield self._told(Pushed(repo, kind, REPORT, "on the Hub", commit))

    def plan(self, *, only: int | None = None) -> Iterator[Pushed]:
        """The outcomes that `push` would have; nothing is written."""
        for parcel in parcels(self.run, self.section, self._writer):
            if only in (None, parcel.iteration):
                yield self._planned(parcel)

    def _persistently(self, parcel: Parcel) -> Pushed:
        remote, place = Remote(parcel.repo, parcel.kind), (parcel.repo, parcel.kind, parcel.tag)
        private = self.section.private
        try:
            commit = persistently(
                lambda: remote.push(parcel, self.scratch, private=private),
                parcel.repo,
                self.patience,
                lambda failure: self._told(Pushed(*place, "failed", error=failure.text)),
                self.trouble,
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
            commit = persistently(ask, parcel.repo, lambda: PLAN_SECONDS, at_once=self.trouble)
        except PushError as error:
            return Pushed(*place, "failed", error=str(error), lasts=error.failure.lasts)
        return Pushed(*place, "on the Hub" if commit else "would be pushed", commit)

    def _told(self, found: Pushed) -> Pushed:
        """Record an outcome in the run's events, unless it is the same as the last one of this upload."""
        event: HubPushed | HubPushFailed
        if found.state == "failed":
            event = HubPushFailed(
                repo=found.repo, kind=found.kind, what=found.what, error=found.error or "", lasts=found.lasts
            )
        else:
            event = HubPushed(repo=found.repo, kind=found.kind, what=found.what, commit=found.commit or "")
        if not _is_known(event, self.run.events()):
            with contextlib.suppress(OSError):  # a full disk, which the run itself reports
                self.run.record(event)
        return found


def first_repo(section: HubSection) -> tuple[str, Kind]:
    """The repo that gets the report, and its kind."""
    if section.model is not None:
        return section.model, "model"
    return section.pairs or section.rollouts or "", "dataset"


def _is_known(event: HubPushed | HubPushFailed, events: list[Event]) -> bool:
    """Whether the last event about the same upload says the same."""
    for other in reversed(events):
        if isinstance(other, HubPushed | HubPushFailed) and (other.repo, other.what) == (event.repo, event.what):
            if isinstance(event, HubPushed):
                return isinstance(other, HubPushed) and other.commit == event.commit
            if isinstance(other, HubPushed):
                return False
            return other.error == event.error or not (other.lasts or event.lasts)
    return False
