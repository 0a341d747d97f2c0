"""Builds what a run uploads to the Hub: for each iteration and repo one upload, which becomes one commit and one tag.

An upload depends on published content alone, not on when or where it is pushed: from any copy of the run it is the
same.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from contracts.artifacts import Artifact
from contracts.fingerprint import file_sha256
from pipelines.config.sections import HubSection
from pipelines.graph import name_of, tag_of
from pipelines.hub.cards import checkpoint_card, pairs_card, rollouts_card
from pipelines.hub.parquet import RolloutsWriter
from pipelines.hub.published_run import PublishedRun, without_directories
from pipelines.run.directory import RunDirectory

Kind = Literal["model", "dataset"]
LOG = "logs/hub.log"
"""Log of the process that pushes in the background."""
README = "README.md"
REPORT = "report"
REPORT_PAGE, REPORT_FOLDER = "report.html", "report.samples"
INITIAL = "setup/sft"
"""The stage that trains the initial policy, in runs that have one."""


@dataclass(frozen=True)
class UploadFile:
    """One file of a commit."""

    path: str
    """Path in the repo."""
    content: Path | bytes
    sha256: str = ""
    """The expected digest of its content, where a manifest has one."""

    def git_oid(self) -> str:
        """The git object id (SHA-1) of its content."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def checked_sha256(self) -> str:
        """The SHA-256 of the current content.

        Raises:
            DamagedError: the content is not what was published.
        """
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        found = file_sha256(self.content)
        if self.sha256 not in ("", found):
            raise DamagedError(
                f"{self.content} differs from its manifest (sha256 {found[:12]}, was {self.sha256[:12]}), so it was "
                f"not pushed. Delete {self.content.parent} and run the same command again, which recomputes it."
            )
        return found


class DamagedError(Exception):
    """Published content is missing or has changed."""


@dataclass(frozen=True)
class UploadContent:
    """The files of an upload."""

    items: tuple[UploadFile, ...]
    """The files by which a commit on the Hub is recognised as this upload."""
    card: str
    """The repo's README.md from this iteration on."""
    obsolete: tuple[str, ...] = ()
    """Paths of the previous iteration's files that this one does not have."""
    make: Callable[[Path], list[UploadFile]] = lambda scratch: []
    """Writes further files, which exist only for the upload, into an empty directory, and returns them."""


@dataclass(frozen=True)
class Upload:
    """One iteration's commit to one repo."""

    repo: str
    kind: Kind
    iteration: int
    title: str
    """First line of the commit."""
    fill: Callable[[], UploadContent]

    @property
    def tag(self) -> str:
        """The tag of the commit."""
        return tag_of(self.iteration)

    @functools.cached_property
    def content(self) -> UploadContent:
        """The files, read on first use."""
        return self.fill()


def ready(run: RunDirectory, section: HubSection) -> Iterator[tuple[str, str, int]]:
    """(repo, role, iteration) of everything that can be pushed, in order: the iterations with an evaluated policy."""
    published = PublishedRun(run, section)
    for iteration in range(run.iterations + 1):
        if published.has(name_of(iteration, "evaluation")):
            repos = {"checkpoint": section.model, "pairs": section.pairs, "rollouts": section.rollouts}
            for role, repo in repos.items():
                if repo and published.has(_stage(published, role, iteration)):
                    yield repo, role, iteration


def uploads(run: RunDirectory, section: HubSection, writer: RolloutsWriter) -> Iterator[Upload]:
    """The uploads of everything that can be pushed."""
    published = PublishedRun(run, section)
    fill: dict[str, Callable[[PublishedRun, str, int], UploadContent]]
    fill = {"checkpoint": _checkpoint, "pairs": _pairs, "rollouts": functools.partial(_rollouts, writer)}
    for repo, role, iteration in ready(run, section):
        kind: Kind = "model" if role == "checkpoint" else "dataset"
        title = f"{published.name}, iteration {iteration}: {role}"
        yield Upload(repo, kind, iteration, title, functools.partial(fill[role], published, repo, iteration))


def report_files(run: RunDirectory) -> list[UploadFile]:
    """The files of the run's report; none where it has no report."""
    page = run.path / REPORT_PAGE
    chunks = sorted((run.path / REPORT_FOLDER).glob("*.js"))  # which the page loads
    return (
        [UploadFile(path.relative_to(run.path).as_posix(), path) for path in (page, *chunks)] if page.is_file() else []
    )


def _stage(published: PublishedRun, role: str, iteration: int) -> str:
    """The stage whose artifact is uploaded."""
    if role == "checkpoint":
        return name_of(iteration, "training") if iteration else INITIAL
    return name_of(iteration, {"pairs": "pairs", "rollouts": published.rollouts_stage}[role])


def _checkpoint(published: PublishedRun, repo: str, iteration: int) -> UploadContent:
    policy = published.artifact(_stage(published, "checkpoint", iteration))
    before = published.find(_stage(published, "checkpoint", iteration - 1)) if iteration else None
    files = {file.path for file in policy.manifest.files}
    gone = {file.path for file in before.manifest.files} - files if before else set()
    items = tuple(UploadFile(file.path, policy.path / file.path, file.sha256) for file in policy.manifest.files)
    provenance = UploadFile("provenance.json", provenance_of(policy))
    card = checkpoint_card(published, repo, iteration, policy.manifest)
    return UploadContent((*items, provenance), card, tuple(sorted(gone)))


def _pairs(published: PublishedRun, repo: str, iteration: int) -> UploadContent:
    pairs = published.artifact(_stage(published, "pairs", iteration))
    (table,) = (file for file in pairs.manifest.files if file.path.endswith(".parquet"))
    items = (
        UploadFile(split_file(iteration), pairs.path / table.path, table.sha256),
        UploadFile(f"provenance/iteration_{iteration}.json", provenance_of(pairs)),
    )
    return UploadContent(items, pairs_card(published, repo, iteration))


def _rollouts(writer: RolloutsWriter, published: PublishedRun, repo: str, iteration: int) -> UploadContent:
    rollouts, scores = published.artifact(_stage(published, "rollouts", iteration)), published.scores_of(iteration)

    def make(scratch: Path) -> list[UploadFile]:
        target = scratch / "rollouts.parquet"
        writer.write(rollouts.path, {name: found.path for name, found in scores.items()}, target)
        return [UploadFile(split_file(iteration), target)]

    made_of = provenance_of(rollouts, **{f"scores {name}": found for name, found in scores.items()})
    items = (UploadFile(f"provenance/iteration_{iteration}.json", made_of),)
    return UploadContent(items, rollouts_card(published, repo, iteration), make=make)


def split_file(iteration: int) -> str:
    """The path of an iteration's rows in a data set."""
    return f"data/iteration_{iteration}.parquet"


def provenance_of(artifact: Artifact, **others: Artifact) -> bytes:
    """The parts of a manifest that identify an artifact, without when, where and how fast it was computed, as JSON."""

    def part(artifact: Artifact) -> dict[str, object]:
        manifest = artifact.manifest
        names = ("schema", "stage", "key", "key_parts", "digest", "inputs", "rows", "ledger", "files", "weights")
        return {name: without_directories(msgspec.to_builtins(getattr(manifest, name))) for name in names}

    content = part(artifact) | {name: part(other) for name, other in others.items()}
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
