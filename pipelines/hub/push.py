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
from pipelines.hub.failures import Failure, PushError, with_retries
from pipelines.hub.parquet import RolloutsWriter
from pipelines.hub.remote import Remote
from pipelines.hub.uploads import LOG, REPORT, Kind, Upload, report_files, uploads
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
        self.on_failure: Callable[[Failure], object] = lambda failure: None
        """Called with the first failure of a request, at once, for callers that a user is watching."""
        self.run = run
        self.section = section
        self.patience = patience or (lambda: section.patience_seconds)
        self.scratch = run.path / SCRATCH
        self.failed: set[str] = set()  # repos, in the last pass
        self._writer = RolloutsWriter(run)

    @contextlib.contextmanager
    def exclusive(self, *, wait: bool = True) -> Iterator[None]:
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
        for upload in uploads(self.run, self.section, self._writer):
            if upload.repo in self.failed or only not in (None, upload.iteration) or (upload.repo, upload.tag) in there:
                continue
            found = self._push(upload)
            if found.state == "failed":
                self.failed.add(upload.repo)
            yield found

    def report(self) -> Iterator[Pushed]:
        """Push the run's report, if there is one, to a repo that has uploads already."""
        repo, kind = report_repo(self.section)
        files = report_files(self.run)
        if not self.section.report or not files or repo in self.failed:
            return
        remote = Remote(repo, kind)
        try:
            title = f"{self.run.path.name}: report"
            commit = with_retries(
                lambda: remote.push_report(files, title), repo, self.patience, on_first_failure=self.on_failure
            )
        except PushError as error:
            yield self._record(Pushed(repo, kind, REPORT, "failed", error=str(error), lasts=error.failure.lasts))
            return
        if commit is not None:
            yield self._record(Pushed(repo, kind, REPORT, "on the Hub", commit))

    def plan(self, *, only: int | None = None) -> Iterator[Pushed]:
        """The outcomes that `push` would have; nothing is written."""
        for upload in uploads(self.run, self.section, self._writer):
            if only in (None, upload.iteration):
                yield self._plan(upload)

    def _push(self, upload: Upload) -> Pushed:
        remote, place = Remote(upload.repo, upload.kind), (upload.repo, upload.kind, upload.tag)
        private = self.section.private
        try:
            commit = with_retries(
                lambda: remote.push(upload, self.scratch, private=private),
                upload.repo,
                self.patience,
                lambda failure: self._record(Pushed(*place, "failed", error=failure.text)),
                self.on_failure,
            )
        except PushError as error:
            return self._record(Pushed(*place, "failed", error=str(error), lasts=error.failure.lasts))
        return self._record(Pushed(*place, "on the Hub", commit))

    def _plan(self, upload: Upload) -> Pushed:
        remote = Remote(upload.repo, upload.kind)

        def ask() -> str | None:
            head = remote.head()
            return remote.find(upload, head)[0] if head is not None else None

        place = (upload.repo, upload.kind, upload.tag)
        try:
            commit = with_retries(ask, upload.repo, lambda: PLAN_SECONDS, on_first_failure=self.on_failure)
        except PushError as error:
            return Pushed(*place, "failed", error=str(error), lasts=error.failure.lasts)
        return Pushed(*place, "on the Hub" if commit else "would be pushed", commit)

    def _record(self, found: Pushed) -> Pushed:
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


def report_repo(section: HubSection) -> tuple[str, Kind]:
    """The repo that gets the report, and its kind."""
    if section.model is not None:
        return section.model, "model"
    return section.pairs or section.rollouts or "", "dataset"


def _is_known(event: HubPushed | HubPushFailed, events: list[Event]) -> bool:
    """Whether the last event about the same upload says the same; all failures that are still retried count as one."""
    for other in reversed(events):
        if isinstance(other, HubPushed | HubPushFailed) and (other.repo, other.what) == (event.repo, event.what):
            if isinstance(event, HubPushed):
                return isinstance(other, HubPushed) and other.commit == event.commit
            if isinstance(other, HubPushed):
                return False
            return other.error == event.error or not (other.lasts or event.lasts)
    return False
