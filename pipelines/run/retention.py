"""Retention: decides which checkpoints lose their weights and which rows are compressed, and why others are kept.

A *released* checkpoint has lost its weights and keeps everything else, in particular its manifest, so that artifacts
made from it are still reused. If a stage needs the weights later, the driver first reruns the stage that made them.

A kill at any instant leaves one of these states, and each is cleaned up:
  a released.json whose files are still there         the next pass deletes the files
  FILE next to FILE.gz                                the next pass checks FILE.gz and deletes FILE
  a scratch file, or a directory .trash-*             the next pass or `pipeline gc` deletes it

While a released stage runs again, its old output is in superseded/, as after a change of its key.
"""

import gzip
import hashlib
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contracts.artifacts import Artifact, artifact_of
from contracts.config import read_yaml
from contracts.errors import UserError
from contracts.files import fsync, process_name, write_atomically
from contracts.fingerprint import RELEASED
from contracts.jsonl import COMPRESSED
from contracts.manifest import MANIFEST, File, Released, read_manifest, with_checksum
from contracts.nested import leaves
from contracts.records import EXPERIENCE, ROLLOUTS, SCORES
from pipelines.config.sections import HubSection, RetentionSection
from pipelines.graph import Graph, Node, tag_of
from pipelines.run.decisions import SUPERSEDED, why_rebuilt
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, RetentionFailed, RetentionHeld, RowsCompressed, WeightsReleased, pushed_to_hub
from pipelines.run.gates import refused
from pipelines.run.metrics import best_of, evaluations, policy_of

TRAINED = ("training", "ema", "critic")
"""Roles of the nodes whose weights may be deleted."""
ROWS = (ROLLOUTS, SCORES, EXPERIENCE)
"""Schemas of the artifacts whose rows may be compressed."""
CHUNK = 1 << 20


# Policy.


def still_read(graph: Graph, published: Collection[str]) -> dict[str, str]:
    """Each stage whose output is an input of a stage that is still to run, with the first such reader."""
    waiting = [node for node in graph.nodes.values() if node.name not in published]
    return {needed: node.name for node in reversed(waiting) for needed in node.needs}


def may_be_released(node: Node) -> bool:
    """Whether a node publishes a checkpoint of an iteration, whose weights may be deleted."""
    return node.iteration is not None and node.role in TRAINED


def unpushed(run: RunDirectory, graph: Graph, hub: HubSection | None) -> set[str]:
    """The training stages whose checkpoints have to be pushed to the Hub and are not recorded as pushed."""
    if hub is None or hub.model is None:
        return set()
    pushed = pushed_to_hub(run.events())
    trained = [node for node in graph.nodes.values() if node.role == "training"]
    return {node.name for node in trained if (hub.model, tag_of(node.iteration or 0)) not in pushed}


def why_kept(
    run: Path, graph: Graph, published: Collection[str], keep: str, waiting: Collection[str] = ()
) -> dict[str, str | None]:
    """The reason to keep the weights of each checkpoint of an iteration that has them; None if they may be deleted.

    Args:
        published: stages that will not run again as things stand.
        waiting: stages whose checkpoints must be pushed first.
    """
    trained = [node for node in graph.nodes.values() if node.name in published and may_be_released(node)]
    policies, averages, critics = ([node.name for node in trained if node.role == role] for role in TRAINED)
    latest = policies[-int(keep.removeprefix("last ")) :] if keep.startswith("last ") else []
    kept_iterations = {graph.nodes[name].iteration for name in latest}
    rows = evaluations(graph)
    waiting_gates = [node for node in graph.nodes.values() if node.role == "gate" and node.name not in published]
    undecided = {node.iteration or 0 for node in waiting_gates}
    evaluators = [node for node in graph.nodes.values() if node.stage.name == "evaluation"]
    causes = {name: f"{reader} still needs it" for name, reader in still_read(graph, published).items()}
    for names, cause in (
        (policies[-1:], "the last policy, from which more iterations start"),
        (averages[-1:], "the last average"),
        (critics[-1:], "the last critic, from which more iterations start"),
        (policies[-1 - graph.lag :], f"more iterations sample from it, at lag={graph.lag}"),
        (
            [graph.producer_name(policy_of(node, graph)) for node in evaluators if node.name not in published],
            "not evaluated yet",
        ),
        ([graph.producer_name(best_of(rows, refused(graph))[0])] if rows else [], "the best so far"),
        (
            [graph.producer_name(best_of(rows, refused(graph) | undecided)[0])] if rows else [],
            "the best if undecided gates refuse",
        ),
        ([node.name for node in trained if node.iteration in kept_iterations], f"keep={keep}"),
        (waiting, "not on the Hub yet"),
    ):
        for name in filter(None, names):
            causes.setdefault(name, cause)
    reasons: dict[str, str | None] = {}
    for node in trained:
        artifact = Artifact.open(node.output)
        if artifact.released and _weights(artifact):  # killed between the decision and the deletion
            reasons[node.name] = None
        elif _weights(artifact):
            reasons[node.name] = "keep=all" if keep == "all" else causes.get(node.name)
    if None in reasons.values():
        for path, other in read_by_others(run).items():
            read = [name for name, kept in reasons.items() if kept is None and path.is_relative_to(name)]
            reasons |= dict.fromkeys(read, f"the run {other} reads it")
    return reasons


def compressible(graph: Graph, published: Collection[str]) -> Iterator[tuple[Node, str | None]]:
    """The uncompressed rollouts, scores and experience, each with the reason to leave it uncompressed, or None."""
    readers = still_read(graph, published)
    trainings = {node.iteration: name for name, node in graph.nodes.items() if node.role == "training"}
    for name, node in graph.nodes.items():
        if node.iteration is None or node.stage.schema not in ROWS or name not in published:
            continue
        files = [path for path, _ in plain_shards(Artifact.open(node.output))]
        if not files:
            continue
        training = trainings.get(node.iteration)
        if name in readers:
            yield node, f"{readers[name]} still reads it"
        elif training is not None and training not in published:
            yield node, f"{training} is not published yet"
        elif any(path.stat().st_nlink > 1 for path in files):
            yield node, "another run shares it, and would not share the compressed files"
        else:
            yield node, None


@dataclass(frozen=True)
class CollectionStep:
    """An action on one path of a run, and the reason for it."""

    verb: Literal["delete", "release", "compress", "keep"]
    path: Path
    reason: str
    bytes: int
    """Disk space in bytes that the action frees at most."""


def steps(
    run: RunDirectory, graph: Graph, published: Collection[str], section: RetentionSection, hub: HubSection | None
) -> Iterator[CollectionStep]:
    """The decision about each checkpoint that still has its weights, and about all uncompressed rows."""
    for name, kept in why_kept(run.path, graph, published, section.keep, unpushed(run, graph, hub)).items():
        output = graph.nodes[name].output
        why = kept or f"its weights; nothing needs them, keep={section.keep}"
        size = own_bytes(_weights(Artifact.open(output)))
        yield CollectionStep("keep" if kept else "release", output, why, size)
    for node, kept in compressible(graph, published) if section.compress else ():
        size = own_bytes(path for path, _ in plain_shards(Artifact.open(node.output)))
        yield CollectionStep("keep" if kept else "compress", node.output, kept or "its rows", size)


def read_by_others(run: Path) -> dict[Path, str]:
    """Paths inside a run that other runs in the same folder use as inputs, each with the name of such a run.

    An artifact that the other run has a copy of itself does not count, such as what a fork shares.

    Raises:
        UserError: the inputs of another run cannot be read.
    """
    here = run.resolve()
    found: dict[Path, str] = {}
    for marker in sorted(run.parent.glob("[!.]*/run.json")):
        other = marker.parent
        if other.resolve() == here:
            continue
        for text in _names_in(other):
            bases = [Path("/")] if text.startswith("/") else [*run.parents, Path.cwd()]
            for path in {(base / text).resolve() for base in bases}:
                if path.is_relative_to(here) and not _has_own(other, path.relative_to(here)):
                    found[path.relative_to(here)] = other.name
    return found


def _has_own(run: Path, inside: Path) -> bool:
    artifact = artifact_of(run / inside)
    return artifact is not None and artifact.path.is_relative_to(run)


def _names_in(run: Path) -> set[str]:
    """All strings in a run's config and in its artifacts' inputs that may be paths."""
    sources: list[Any] = []
    if (run / "config.resolved.yaml").is_file():
        sources.append(read_yaml(run / "config.resolved.yaml"))
    for folder, inner, files in os.walk(run):
        inner[:] = [name for name in inner if name not in ("logs", SUPERSEDED) and not name.startswith(".")]
        for name in {"run.json", MANIFEST}.intersection(files):
            path = Path(folder, name)
            try:
                content = path.read_bytes()
                sources.append(json.loads(content) if name == "run.json" else read_manifest(content).input_paths)
            except FileNotFoundError:
                continue  # its driver has just moved it
            except ValueError as error:
                raise UserError(
                    f"{path} is damaged, so that its run's inputs are unknown: {error}. Delete it and continue "
                    "that run, which rebuilds it."
                ) from error
    return {text for text in leaves(sources) if isinstance(text, str) and "/" in text and not {"\n", "\0"} & set(text)}


def _weights(artifact: Artifact) -> list[Path]:
    """The weight files that exist."""
    return [path for path in (artifact.path / name for name in _weight_names(artifact)) if path.exists()]


def _weight_names(artifact: Artifact) -> list[str]:
    return [file.path for file in artifact.manifest.files if file.path.endswith(".safetensors")]


def plain_shards(artifact: Artifact) -> list[tuple[Path, File]]:
    """The shards that are stored uncompressed."""
    shards = [(artifact.path / file.path, file) for file in artifact.manifest.files if file.path.startswith("shard-")]
    return [(path, file) for path, file in shards if path.exists()]


def own_bytes(files: Iterable[Path]) -> int:
    """Bytes that deleting the files frees; a file with another hard link frees none."""
    found = [path.lstat() for path in files]
    return sum(status.st_size for status in found if status.st_nlink == 1)


# Deleting and compressing.


def release(artifact: Artifact, reason: str) -> int:
    """Record in released.json that a checkpoint's weights are deleted, and delete them. Returns the bytes freed."""
    _clear_scratch(artifact.path, RELEASED)
    if not artifact.released:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = Released(tuple(_weight_names(artifact)), reason, now)
        write_atomically(artifact.path / RELEASED, with_checksum(record))
    freed = own_bytes(_weights(artifact))
    for path in _weights(artifact):
        path.unlink()
    fsync(artifact.path)
    return freed


def compress(artifact: Artifact, stop: threading.Event | None = None) -> int:
    """Replace the shards of an artifact by FILE.gz. Returns the bytes freed; stops early when `stop` is set.

    Raises:
        UserError: a file differs from the manifest; it is left as it is.
    """
    freed = 0
    _clear_scratch(artifact.path, f"*{COMPRESSED}")
    for path, file in plain_shards(artifact):
        target = path.with_name(path.name + COMPRESSED)
        if _unpacked_sha256(target) != file.sha256:
            try:
                packed = _pack(path, target, file.sha256, stop)
            except OSError:  # such as a full disk: free what was written
                _clear_scratch(artifact.path, f"*{COMPRESSED}")
                raise
            if not packed:
                break
            freed -= target.stat().st_size
        freed += own_bytes([path])
        path.unlink()
        fsync(artifact.path)
    return freed


def _pack(path: Path, target: Path, sha256: str, stop: threading.Event | None) -> bool:
    """Write FILE.gz under a temporary name, verify and rename it. Returns False if `stop` was set."""
    scratch = target.with_name(f"{target.name}.{process_name()}.tmp")
    with path.open("rb") as source, scratch.open("wb") as packed:
        # Without file name and time in the header, equal rows give equal bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=6, mtime=0) as writer:
            while chunk := source.read(CHUNK):
                if stop is not None and stop.is_set():
                    scratch.unlink()
                    return False
                writer.write(chunk)
        packed.flush()
        os.fsync(packed.fileno())
    if _unpacked_sha256(scratch) != sha256:
        scratch.unlink()
        raise UserError(
            f"{path}: its content differs from the manifest, so that it was not compressed. Delete {path.parent} and "
            "run the same command again, which rebuilds it."
        )
    os.replace(scratch, target)
    fsync(target.parent)
    return True


def _unpacked_sha256(path: Path) -> str | None:
    """SHA-256 of the content of a compressed file; None if it is damaged or missing."""
    try:
        with gzip.open(path) as content:
            return hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
    except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error):
        return None


def _clear_scratch(directory: Path, pattern: str) -> None:
    for path in directory.glob(f"{pattern}.*.tmp"):
        path.unlink()


# Restoring deleted weights.


def released_inputs(node: Node, graph: Graph, where: Callable[[Path], Path] = lambda path: path) -> list[str]:
    """The inputs of a node whose weights were deleted; `where` maps an output to its present place."""
    return [name for name in node.needs if (where(graph.nodes[name].output) / RELEASED).is_file()]


def stages_to_rebuild(graph: Graph, runs: Collection[str], where: Callable[[Path], Path]) -> dict[str, str]:
    """The released stages that must run again if the stages `runs` do, each with the reason."""
    found: dict[str, str] = {}
    todo = list(runs)
    while todo:
        reader = todo.pop()
        for name in released_inputs(graph.nodes[reader], graph, where):
            if name not in found and name not in runs:
                found[name] = why_rebuilt(reader)
                todo.append(name)
    return found


# During a run.


class Retention:
    """Applies the section `retention` during a run. Failures are recorded and do not end the run."""

    def __init__(
        self, run: RunDirectory, graph: Graph, section: RetentionSection, hub: HubSection | None = None
    ) -> None:
        self.run = run
        self.graph = graph
        self.section = section
        self.hub = hub
        self._recorded: set[Event] = set()
        self._stop = threading.Event()
        self._worker = ThreadPoolExecutor(1, "compression")
        self._compressing: dict[str, Future[int]] = {}
        self._tried: set[str] = set()

    def __enter__(self) -> "Retention":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._worker.shutdown(cancel_futures=True)

    def apply(self, published: Collection[str]) -> None:
        """Delete the weights that are no longer needed, and compress rows in a background thread."""
        if self.section.keep == "all" and not self.section.compress:
            return
        if self.run.pinned:
            self._once(RetentionHeld(reason=f"{self.run.path.name} is pinned"))
            return
        try:
            for step in steps(self.run, self.graph, published, self.section, self.hub):
                name = step.path.relative_to(self.run.path).as_posix()
                if step.verb == "release":
                    freed = release(Artifact.open(step.path), step.reason)
                    self.run.record(WeightsReleased(stage=name, bytes=freed, reason=step.reason))
                elif step.verb == "compress" and name not in self._tried:
                    self._tried.add(name)
                    self._compressing[name] = self._worker.submit(compress, Artifact.open(step.path), self._stop)
        except Exception as error:
            self._failed("retention", error)

    def poll(self) -> bool:
        """Record what the background thread has finished. Returns whether it has more to do."""
        for name, job in list(self._compressing.items()):
            if job.done():
                del self._compressing[name]
                error = job.exception()
                if error is None:
                    self.run.record(RowsCompressed(stage=name, bytes=job.result()))
                else:
                    self._failed(f"compressing {name}", error)
        return bool(self._compressing)

    def _failed(self, what: str, error: BaseException) -> None:
        self._once(RetentionFailed(what=what, error=f"{type(error).__name__}: {error}"))

    def _once(self, event: Event) -> None:
        if event not in self._recorded:
            self._recorded.add(event)
            self.run.record(event)
