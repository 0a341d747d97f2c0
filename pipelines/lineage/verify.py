"""`pipeline verify`: checks that the artifacts of a run match their manifests and each other."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from contracts.artifacts import Artifact, input_damage
from contracts.errors import UserError
from contracts.fingerprint import MODEL_FILES, RELEASED
from contracts.jsonl import COMPRESSED, open_stored
from contracts.manifest import MANIFEST, File, content_digest
from contracts.records import CHECKPOINT, EXPERIENCE, PAIRS, ROLLOUTS, SCORES
from contracts.stage import stage_key
from pipelines.lineage.crosscheck import contradictions, metric_mismatches
from pipelines.lineage.links import (
    RUN,
    Index,
    fingerprint_of,
    is_alternative,
    is_superseded,
    links_of,
    model_of,
    run_of,
)
from pipelines.run import gc
from pipelines.run.decisions import lender_file
from pipelines.run.directory import UNPUBLISHED, RunDirectory
from pipelines.text import echo, format_megabytes, plural

DERIVED = (SCORES, PAIRS, EXPERIENCE)
"""Schemas of artifacts whose rows are derived from rollouts."""
SHOWN = 5
"""Maximum number of contradictions listed per rollouts artifact; the others are counted."""


@dataclass
class Findings:
    """Counts and findings of a verification; every line begins with the path that it is about."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Files that nothing reads or cleans up."""
    notes: list[str] = field(default_factory=list)
    """Checks that were not possible, and other remarks."""
    artifacts: int = 0
    files: int = 0
    bytes: int = 0
    rows: int = 0
    released: int = 0

    def __str__(self) -> str:
        """`36 artifacts, 106 files, 2.8 MB, 997 rows checked: no problem`."""

        what = f"{plural(self.artifacts, 'artifact')}, {plural(self.files, 'file')}, {format_megabytes(self.bytes)}"
        released = f"; {plural(self.released, 'file')} deleted by `pipeline gc`" if self.released else ""
        found = plural(len(self.problems), "problem") if self.problems else "no problem"
        return f"{what}, {plural(self.rows, 'row')} checked{released}: {found}"


class DamageError(Exception):
    """A published artifact is damaged or incomplete."""

    exit_code = 1


def print_verification(console: Console, path: Path, *, as_json: bool = False) -> None:
    """Verify a run or an artifact and print the findings, problems first.

    Raises:
        DamageError: there are problems.
    """
    findings = verify(path, None if as_json else console)
    if as_json:
        found = {name: getattr(findings, name) for name in ("problems", "warnings", "notes")}
        print(json.dumps({"path": str(path), **found, "summary": str(findings)}, indent=1))
    else:
        warnings = [f"warning: {text}" for text in findings.warnings]
        echo(
            console, *findings.problems, *warnings, *(f"note: {text}" for text in findings.notes), f"{path}: {findings}"
        )
    if findings.problems:
        raise DamageError(
            f"{path} is damaged. Delete the directory that holds a damaged or missing file and continue "
            "the run: it rebuilds that directory, and reuses everything that does not depend on it."
        )


def verify(path: Path, console: Console | None = None) -> Findings:
    """Check everything that is published in a run, or one artifact.

    Raises:
        UserError: the path is neither.
    """
    single = (path / MANIFEST).is_file()
    if not single:
        RunDirectory.existing(path)
    run = path if not single else run_of(path) or run_of(path.absolute())
    return _Verification(Index(run or path), path if single else None).run(console)


class _Verification:
    """Verifies one artifact of an index, or all."""

    def __init__(self, index: Index, only: Path | None) -> None:
        chosen = {
            name: index.path / name
            for name in [*index.artifacts, *index.damaged]
            if only is None or (index.path / name).absolute() == only.absolute()
        }
        self.index = index
        self.whole_run = only is None
        self.driven = is_driven(index.path)
        self.targets = [index.artifacts[name] for name in chosen if name in index.artifacts]
        self.findings = Findings(artifacts=len(chosen))
        self.findings.problems += [str(error) for name, error in index.damaged.items() if name in chosen]
        self.released: dict[Path, frozenset[str]] = {}
        self.broken: set[Path] = set()
        """Artifacts with damaged files; their rows are not cross-checked."""

    def run(self, console: Console | None) -> Findings:
        """Run all checks; those that read rows come last."""
        problems = self.findings.problems
        for artifact in self.targets:
            problems += self.check_manifest(artifact)
        self.check_files(console)
        self.check_links()
        self.check_rows()
        if self.whole_run:
            problems += self.check_run()
        if self.whole_run and not self.driven:
            problems += metric_mismatches(
                self.index, [artifact for artifact in self.targets if self.is_readable(artifact)]
            )
            problems += [f"{path}: files without a manifest.json" for path in unpublished_directories(self.index.path)]
            self.findings.warnings += leftovers(self.index.path)
        return self.findings

    def check_run(self) -> Iterator[str]:
        """Check that run.json can be read."""
        try:
            _ = RunDirectory(self.index.path).iterations
        except UserError as error:
            yield str(error)

    def check_manifest(self, artifact: Artifact) -> Iterator[str]:
        """Check that a manifest is consistent in itself."""
        manifest, where = artifact.manifest, artifact.path / MANIFEST
        if content_digest(manifest.schema, manifest.files) != manifest.digest:
            yield f"{where}: the digest does not fit the files listed"
        if stage_key(manifest.key_parts) != manifest.key:
            yield f"{where}: the key is not that of the parts listed"
        if manifest.key_parts.get("inputs") != manifest.inputs:
            yield f"{where}: the inputs are not those that the key was computed from"
        if manifest.rows != (rows := sum(file.rows for file in manifest.files)):
            yield f"{where}: it has {manifest.rows} rows, but its files add up to {rows}"
        try:
            manifest.ledger.check()
        except AssertionError as error:
            yield f"{where}: the ledger does not add up: {error}"
        if manifest.schema == CHECKPOINT and manifest.weights not in (None, fingerprint_of(sha256_of(artifact))):
            yield f"{where}: the fingerprint of the weights is not that of the files listed"
        for name in sorted(self.released_of(artifact) - sha256_of(artifact).keys()):
            yield f"{artifact.path / RELEASED}: it names {name}, which the manifest does not list"

    def check_files(self, console: Console | None) -> None:
        """Hash the files in parallel, count their rows, and look for files that no manifest lists."""
        findings, jobs = self.findings, list[tuple[Artifact, File]]()
        for artifact in self.targets:
            released = self.released_of(artifact)
            findings.released += len(released)
            jobs += [(artifact, file) for file in artifact.manifest.files if file.path not in released]
            for name in unlisted_files(artifact):
                stray = f"{artifact.path / name}: no manifest lists it"
                if artifact.manifest.schema == CHECKPOINT and (name.endswith(".safetensors") or name in MODEL_FILES):
                    findings.problems.append(f"{stray}, and loading the checkpoint may read it")
                elif not self.driven:
                    findings.warnings.append(stray)
        shown = console is not None and console.is_terminal
        with (
            ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool,
            Progress(console=console, transient=True, disable=not shown) as progress,
        ):
            task = progress.add_task("reading files", total=sum(file.bytes for _, file in jobs))
            for (artifact, file), (rows, problem) in zip(
                jobs, pool.map(lambda job: verify_file(*job), jobs), strict=True
            ):
                findings.files += 1
                findings.bytes += file.bytes
                findings.rows += rows
                progress.advance(task, file.bytes)
                if problem and (artifact.path / MANIFEST).exists():  # otherwise the driver has moved it meanwhile
                    findings.problems.append(problem)
                    self.broken.add(artifact.path)

    def check_links(self) -> None:
        """Check that the inputs that manifests name exist with the content that was read."""
        problems: dict[str, list[str]] = {}
        notes: dict[str, list[str]] = {}
        outside: set[Path] = set()
        for artifact in self.targets:
            reader = self.index.name_of(artifact)
            for link in links_of(artifact.manifest):
                found, text = self.index.find(link), ""
                if found.state == "damaged" and not found.inside:  # otherwise the artifact itself is reported
                    text = f"{link.path}: {found.error}"
                elif found.state == "changed":
                    text = f"{found.place}: it has changed (its digest is {found.now:.12}, was {link.digest:.12})"
                elif found.state == "gone":
                    text = f"{found.place}: it is missing (its digest was {link.digest:.12})"
                elif found.state == "replaced" and not is_superseded(reader):
                    text = f"{found.place}: it was read, but the run now has another artifact at {link.path}"
                if text:
                    serious = found.state in ("changed", "damaged") or (found.state == "gone" and found.inside)
                    serious = serious and not is_alternative(reader)  # the run may have replaced their inputs since
                    (problems if serious else notes).setdefault(text, []).append(f"{link.name} of {reader}")
                if not found.inside and found.state == "same" and found.artifact:
                    outside.add(found.place)
        self.findings.problems += [f"{text}; input {list_readers(readers)}" for text, readers in problems.items()]
        self.findings.notes += [f"{text}; input {list_readers(readers)}" for text, readers in notes.items()]
        for place in sorted(outside):
            self.findings.problems += input_damage(place)

    def check_rows(self) -> None:
        """Cross-check scores, pairs and experience with their rollouts, and rollouts with their policy."""
        groups: dict[Path, tuple[Artifact, list[Artifact]]] = {}
        for artifact in self.targets:
            if artifact.manifest.schema in (ROLLOUTS, *DERIVED) and self.is_readable(artifact):
                read = self.index.input_of(artifact, "rollouts")
                rollouts = artifact if artifact.manifest.schema == ROLLOUTS else read.artifact if read else None
                if rollouts is not None and self.is_readable(rollouts):
                    groups.setdefault(rollouts.path, (rollouts, []))[1].append(artifact)
        for rollouts, derived in groups.values():
            policy = self.index.input_of(rollouts, "policy")
            wrong = contradictions(rollouts, model_of(policy) if policy else None, derived)
            try:
                self.findings.problems += islice(wrong, SHOWN)
                if more := sum(1 for _ in wrong):
                    self.findings.problems.append(f"{rollouts.path}: {more} more contradictions like these")
            except UserError as error:
                self.findings.problems.append(str(error))
            except OSError as error:
                if not self.driven:
                    self.findings.problems.append(f"{error.filename or rollouts.path}: {error.strerror}")

    def is_readable(self, artifact: Artifact) -> bool:
        """Whether all files of an artifact exist undamaged."""
        gone = self.released_of(artifact)
        return artifact.path not in self.broken and not any(file.path in gone for file in artifact.manifest.files)

    def released_of(self, artifact: Artifact) -> frozenset[str]:
        """Names of the files that `pipeline gc` deleted; an unreadable list is a problem."""
        if artifact.path not in self.released:
            self.released[artifact.path] = frozenset()
            try:
                self.released[artifact.path] = artifact.released
            except UserError as error:
                self.findings.problems.append(str(error))
        return self.released[artifact.path]


def is_driven(run: Path) -> bool:
    """Whether a driver is working on a run."""
    return (run / RUN).exists() and (run / "lock").exists() and RunDirectory(run).holder() is not None


def sha256_of(artifact: Artifact) -> dict[str, str]:
    """The SHA-256 of each file of an artifact, by name."""
    return {file.path: file.sha256 for file in artifact.manifest.files}


def verify_file(artifact: Artifact, file: File) -> tuple[int, str | None]:
    """The number of rows in a published file, and its difference from the manifest, if any."""
    path = artifact.path / file.path
    try:
        if problem := artifact.damage_of(file):
            return 0, problem
        rows = count_rows(path) if path.suffix == ".jsonl" else 0
    except OSError as error:
        return 0, f"{error.filename or path}: it cannot be read: {error.strerror}"
    return rows, None if rows == file.rows else f"{path}: it has {rows} rows, but the manifest says {file.rows}"


def count_rows(path: Path) -> int:
    """Number of rows of a JSONL file."""
    with open_stored(path) as lines:
        return sum(1 for line in lines if line.strip())


def unlisted_files(artifact: Artifact) -> list[str]:
    """Files in an artifact's directory that its manifest does not list."""
    known = {MANIFEST, RELEASED}
    for file in artifact.manifest.files:
        stored = (artifact.path / file.path).exists()
        known.add(file.path if stored else file.path + COMPRESSED)
    found = (path.relative_to(artifact.path).as_posix() for path in artifact.path.rglob("*") if not path.is_dir())
    return sorted(set(found) - known)


def unpublished_directories(run: Path) -> Iterator[Path]:
    """Directories of a run that contain files but no manifest."""
    for folder, subfolders, files in os.walk(run):
        here = Path(folder)
        if (here / MANIFEST).is_file():
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if here == run:  # *.samples: texts of samples, for the report
            subfolders[:] = [name for name in subfolders if name not in UNPUBLISHED and not name.endswith(".samples")]
        lent = {lender_file(here / name).name for name in subfolders}  # offered by --share, until a stage reuses it
        if here != run and (not lent.issuperset(files) or MANIFEST in subfolders):
            yield here
            subfolders.clear()


def leftovers(run: Path) -> list[str]:
    """Leftovers of interrupted commands, except those that the next attempt resumes from."""
    found = [f"{path}: it was never finished" for path in sorted(run.glob("*.tmp"))]
    text = "an interrupted command left it; `pipeline gc` deletes it"
    return found + [f"{path}: {text}" for path, _ in gc.leftovers(run) if path.is_dir()]


def list_readers(readers: list[str]) -> str:
    """`model of a, model of b and 3 more`."""
    more = f" and {len(readers) - 3} more" if len(readers) > 3 else ""
    return ", ".join(readers[:3]) + more
