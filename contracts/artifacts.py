"""Published directories. Readers trust only manifests; writers publish by one rename.

A stage writes into a hidden directory beside its target, shard by shard. Each finished shard gets a receipt, so
that a killed stage loses the shard in hand and nothing else. `publish` checks the counts, writes `manifest.json`
last, flushes everything to the disk and renames.

What a crash can leave, and what the next attempt does with it:
  hidden directory, shards with receipts           keeps them, makes the rest
  a `*.tmp` file, or a shard without its receipt   deletes it
  hidden directory with a manifest                 finishes the rename
  the target                                       nothing left to do

Of what is published, `pipeline gc` may compress rows (FILE.gz instead of FILE) and delete files, which
`released.json` then lists; the manifest stays, so that what was made is still known and never made again needlessly.
"""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import msgspec

from contracts.errors import TransientError, UserError
from contracts.fingerprint import ADAPTER, digest, file_sha256, weights_fingerprint
from contracts.fingerprint import RELEASED as RELEASED
from contracts.jsonl import COMPRESSED, open_stored, read_jsonl, write_jsonl
from contracts.ledger import Ledger, merge
from contracts.records import Schema

MANIFEST = "manifest.json"
LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
POLL_SECONDS = 0.1
WORTH_KEEPING = ("*.safetensors", "judged-*.jsonl")
"""What in the folder `state` is kept after a user's mistake, because much was paid for it."""
R = TypeVar("R")


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One published file; `rows` is 0 for files that are not JSONL."""

    path: str
    sha256: str
    bytes: int
    rows: int = 0


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of one finished shard."""

    file: File
    ledger: Ledger
    seconds: dict[str, float] = {}
    facts: dict[str, Any] = {}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The description of an artifact, and the proof that it is complete."""

    schema: Schema
    stage: str
    key: str
    """The stage key: same key, same content."""
    key_parts: dict[str, Any]
    """What the key was made of, to say in words why another key differs."""
    digest: str
    """Of schema and files alone: what downstream keys use."""
    inputs: dict[str, Any]
    """Digest (or digests) of each input."""
    input_paths: dict[str, Any]
    rows: int
    ledger: Ledger
    files: tuple[File, ...]
    weights: str | None
    """Fingerprint of the weights in a checkpoint, or of those that made the rows."""
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: dict[str, float]
    """Where the time went: start, load, compute, save."""
    facts: dict[str, Any]
    """The stage's own results, for example its metrics."""
    created: str
    checksum: str = ""
    """SHA-256 of this file's bytes with this field empty."""


class Released(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files of an artifact that were deleted on purpose."""

    files: tuple[str, ...]
    reason: str
    time: str
    checksum: str = ""
    """SHA-256 of this file's bytes with this field empty."""


D = TypeVar("D", Manifest, Released)


class Artifact:
    """A published directory, opened by its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path, *schemas: Schema) -> "Artifact":
        """Open a published directory.

        Raises:
            UserError: nothing is published there, or it holds something else than one of `schemas`.
        """
        if not (path / MANIFEST).is_file():
            why = "is not published (it has no manifest.json)" if path.exists() else "does not exist"
            raise UserError(f"{path} {why}. Run the stage that makes it first.")
        try:
            manifest = read_manifest((path / MANIFEST).read_bytes())
        except ValueError as error:
            raise UserError(f"{path / MANIFEST} is damaged: {error}. Delete {path} and run its stage again.") from error
        if schemas and manifest.schema not in schemas:
            wanted = " or ".join(f"{schema.name} v{schema.version}" for schema in schemas)
            found = f"{manifest.schema.name} v{manifest.schema.version}"
            raise UserError(f"{path} holds {found}; expected {wanted}.")
        return cls(path, manifest)

    @property
    def shards(self) -> list[Path]:
        """The JSONL files that hold rows, in order; `read_jsonl` reads them also where they are compressed."""
        return [self.path / file.path for file in self.manifest.files if file.path.startswith("shard-")]

    def rows(self, kind: type[R]) -> Iterator[R]:
        """All records, in order."""
        for shard in self.shards:
            yield from read_jsonl(shard, kind)

    def damage(self) -> list[str]:
        """Every way in which the directory differs from its manifest; empty when it is whole."""
        released = self.released
        found = [
            problem for file in self.manifest.files if file.path not in released and (problem := self.damage_of(file))
        ]
        if content_digest(self.manifest.schema, self.manifest.files) != self.manifest.digest:
            found.append(f"{self.path / MANIFEST}: the digest does not fit the files listed")
        return found

    def damage_of(self, file: File) -> str | None:
        """How one file differs from the manifest, or None."""
        path = self.path / file.path
        stored = path if path.exists() else path.with_name(path.name + COMPRESSED)
        if stored.exists() and not stored.is_file():
            return f"{stored}: it is no regular file"
        try:
            with open_stored(path) as content:
                sha256 = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
        except FileNotFoundError:
            return f"{path}: missing"
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            return f"{path}{COMPRESSED}: damaged: {error}"
        if sha256 != file.sha256:
            name = path if path.exists() else f"{path}{COMPRESSED}"
            return f"{name}: its content differs from the manifest (sha256 {sha256[:12]}, was {file.sha256[:12]})"
        return None

    @property
    def released(self) -> frozenset[str]:
        """Names of the files that were deleted on purpose."""
        path = self.path / RELEASED
        if not path.is_file():
            return frozenset()
        try:
            return frozenset(_checked(path.read_bytes(), Released).files)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}. Delete {self.path} and run its stage again.") from error


def read_manifest(content: bytes) -> Manifest:
    """The manifest in a manifest.json.

    Raises:
        ValueError: it is not one, a byte of it was changed, or it names a file outside of its directory.
    """
    manifest = _checked(content, Manifest)
    for file in manifest.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            raise ValueError(f"it names the file {file.path!r}, which is not inside its directory")
    return manifest


def _checked(content: bytes, kind: type[D]) -> D:
    """The record in a file that has its own checksum; ValueError if it is none or a byte of it was changed."""
    record = msgspec.json.decode(content, type=kind)
    blank = content.replace(b'"checksum": "%s"' % record.checksum.encode(), b'"checksum": ""')
    if hashlib.sha256(blank).hexdigest() != record.checksum:
        raise ValueError("its content does not fit its own checksum")
    return record


def with_checksum(record: Manifest | Released) -> bytes:
    """The bytes of a file that has its own checksum."""

    def text(checksum: str) -> bytes:
        found = msgspec.structs.replace(record, checksum=checksum)
        return msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"

    return text(hashlib.sha256(text("")).hexdigest())


def artifact_of(path: Path) -> Artifact | None:
    """The artifact that is at `path` or holds it, if any."""
    for directory in [path, *path.parents]:
        if (directory / MANIFEST).is_file() and (directory == path or _is_manifest(directory / MANIFEST)):
            return Artifact.open(directory)
    return None


def _is_manifest(file: Path) -> bool:
    """Whether a manifest.json is an artifact's, or may have been before it was damaged: others use the name too."""
    try:
        data = json.loads(file.read_bytes())
    except ValueError:
        return True
    return isinstance(data, dict) and len({"schema", "key", "files"} & data.keys()) > 1  # one may be damaged


def model_fingerprint(model: Path) -> str:
    """`weights_fingerprint`; of a published checkpoint, whose files are checked against it elsewhere, as recorded."""
    if (model / MANIFEST).is_file() and (recorded := Artifact.open(model).manifest.weights):
        return recorded
    return weights_fingerprint(model)


def content_digest(schema: Schema, files: tuple[File, ...]) -> str:
    """Digest of an artifact's content: its schema and its files, nothing of when, where or how fast."""
    return digest({"schema": [schema.name, schema.version], "files": sorted((f.path, f.sha256) for f in files)})


def input_digest(source: Path | str) -> str:
    """Digest of an input's content: an artifact, a file, a model, any other directory, or the name of a Hub id.

    Raises:
        UserError: there is nothing at that path.
    """
    if str(source).startswith("hf:"):
        place = re.split("[:@]", str(source).removeprefix("hf:"))[0]
        local = place.startswith(("/", ".")) and Path(place).is_dir()  # as `datasets` reads it from there
        return digest([str(source), input_digest(place)] if local else str(source))
    path = Path(source)
    if (path / MANIFEST).is_file():
        return Artifact.open(path).manifest.digest
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        raise UserError(f"input {path} does not exist. Give a file, a published directory, a model, or hf:ORG/NAME.")
    if (path / "config.json").is_file() and not (path / ADAPTER).is_file():
        return weights_fingerprint(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    try:
        return digest({file.relative_to(path).as_posix(): file_sha256(file) for file in files})
    except FileNotFoundError as error:
        raise UserError(f"input {path} changed while it was read: {error.filename} went away. Try again.") from error


def input_damage(source: Path) -> list[str]:
    """How a stage's input differs from the manifest that lists it, deleted files included; nothing where none does."""
    artifact = artifact_of(source)
    if artifact is None:
        return []
    wanted = [file for file in artifact.manifest.files if (artifact.path / file.path).is_relative_to(source)]
    released = artifact.released
    if gone := [file.path for file in wanted if file.path in released]:
        return [f"{artifact.path}: {', '.join(gone)} was deleted by `pipeline gc`"]
    return [problem for file in wanted if (problem := artifact.damage_of(file))]


def is_published(target: Path, key: str) -> bool:
    """Whether `target` holds what `key` makes.

    Raises:
        UserError: something else is there.
    """
    if not target.exists():
        return False
    if not (target / MANIFEST).is_file():
        raise UserError(f"output {target} exists and is not an artifact. Choose another output, or remove it.")
    found = Artifact.open(target).manifest
    if found.key != key:
        raise UserError(
            f"output {target} was published by another run (stage {found.stage}, key {found.key[:12]}, this is "
            f"{key[:12]}). Choose another output, or remove it to compute it again."
        )
    return True


class Publication:
    """The one way to publish: shards with receipts, then a manifest, then a rename."""

    def __init__(self, target: Path, schema: Schema, stage: str, key: str) -> None:
        self.target = target
        self.schema = schema
        self.stage = stage
        self.key = key
        self.directory = partial_directory(target, key)
        self._lock: IO[str] | None = None

    def begin(self, patience: float = 0.0) -> None:
        """Create the hidden directory or take it over, for this process alone, and clear what a crash left in it.

        Args:
            patience: seconds to wait for another process that works there. On a shared file system the lock of a
                machine that died lives on until its lease ends.

        Raises:
            UserError: another process is making the same thing, and there is no patience.
            TransientError: it still is when the patience has run out.
        """
        self._lock_when_free(lambda: self._take_lock(fcntl.LOCK_EX), patience)
        with contextlib.suppress(FileNotFoundError):  # another process, which held the lock before, has just published
            if not self.complete or self._damaged():
                self._clear_leftovers(self._intact)

    def join(self, patience: float) -> None:
        """Create the hidden directory or go to work in it beside others that make shards and publish nothing.

        Whoever finds no other at work clears what a crash left. Contents are compared when somebody publishes: here
        others wait.

        Raises:
            TransientError: the directory is one process's alone until the patience has run out, in seconds.
        """
        self._lock_when_free(self._take_shared_lock, patience)

    def _lock_when_free(self, take: Callable[[], bool], patience: float) -> None:
        start, told = time.monotonic(), False
        while True:
            try:
                if take():
                    return
            except BlockingIOError as error:
                waited = time.monotonic() - start
                if not patience:
                    raise UserError(
                        f"another process is making {self.target} right now. Wait for it, or choose another output."
                    ) from error
                if waited > patience:
                    raise TransientError(
                        f"another process has been making {self.target} for the {patience:g} s that this one waited "
                        f"for the lock {self.directory / LOCK}. If its machine died, the file server lets go soon."
                    ) from error
                if waited > 1 and not told:
                    print(f"waiting up to {patience:g} s for another process that is making {self.target}", flush=True)
                    told = True
                time.sleep(POLL_SECONDS)

    def _take_shared_lock(self) -> bool:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            if self._take_lock(fcntl.LOCK_EX) and not self.complete:
                self._clear_leftovers()
        return self._take_lock(fcntl.LOCK_SH)

    def _take_lock(self, kind: int) -> bool:
        """Lock a file in the hidden directory, which dies with its holder; False if the directory went meanwhile.

        Raises:
            BlockingIOError: another process holds it.
        """
        path = self.directory / LOCK
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = path.open("a+")  # NFS gives a shared lock to readers only, an exclusive one to writers
            take_lock(self._lock, kind)
            return path.exists() and os.path.samestat(os.fstat(self._lock.fileno()), path.stat())
        except (FileNotFoundError, FileExistsError):
            if self.directory.is_file():
                raise
            return False

    def _damaged(self) -> bool:
        """Whether a file differs from the manifest that is there already, as a power cut may leave it."""
        path = self.directory / MANIFEST
        found = Artifact(self.directory, read_manifest(path.read_bytes())).damage()
        return bool(found) and path.exists()  # it was not renamed meanwhile

    def _clear_leftovers(self, intact: Callable[[Receipt], bool] = lambda receipt: True) -> None:
        """Delete scratch files, files without a receipt or that are not `intact`, and receipts without such a file."""
        known = {name for name, receipt in self.receipts().items() if intact(receipt)}
        known |= {_receipt_name(name) for name in known}
        for path in sorted(self.directory.rglob("*")):  # a receipt before its file
            name = path.relative_to(self.directory).as_posix()
            if path.is_file() and name not in known and name != LOCK and not name.startswith("state/"):
                path.unlink()

    def _intact(self, receipt: Receipt) -> bool:
        return file_sha256(self.directory / receipt.file.path) == receipt.file.sha256

    @property
    def state(self) -> Path:
        """A folder for what helps to continue after a kill; never published."""
        path = self.directory / "state"
        path.mkdir(exist_ok=True)
        return path

    def receipts(self) -> dict[str, Receipt]:
        """Receipts of the finished files by name; a file does not count as finished if it or its receipt is torn."""
        found = (self._read_receipt(path) for path in sorted(self.directory.glob(_receipt_name("*"))))
        return {receipt.file.path: receipt for receipt in found if receipt is not None}

    def receipt(self, name: str) -> Receipt | None:
        """The receipt of one file, if that is finished."""
        return self._read_receipt(self.directory / _receipt_name(name))

    def _read_receipt(self, path: Path) -> Receipt | None:
        try:
            receipt = msgspec.json.decode(path.read_bytes(), type=Receipt)
            size = (self.directory / receipt.file.path).stat().st_size
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return receipt if size == receipt.file.bytes else None

    def finished(self, names: Iterable[str]) -> set[str]:
        """Those of `names` that have a receipt, by one look at the directory: for many files, and often."""
        try:
            there = set(os.listdir(self.directory))
        except FileNotFoundError:  # published meanwhile
            return set()
        return {name for name in names if _receipt_name(name) in there}

    def scratch(self, name: str) -> Path:
        """Where to write the file `name` before `commit` gives it its name."""
        path = self.directory / f"{name}.{process_name()}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(
        self,
        name: str,
        ledger: Ledger,
        *,
        rows: int = 0,
        seconds: dict[str, float] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Make the scratch file `name` one of the artifact's files, with its counts."""
        ledger.check()
        scratch = self.scratch(name)
        _share(scratch)
        fsync(scratch)
        file = File(name, file_sha256(scratch), scratch.stat().st_size, rows)
        os.replace(scratch, self.directory / name)
        receipt = Receipt(file, ledger, seconds or {}, facts or {})
        write_atomically(self.directory / _receipt_name(name), msgspec.json.encode(receipt))

    def write_rows(self, name: str, rows: list[Any], ledger: Ledger, **known: Any) -> None:
        """Write and commit one JSONL file."""
        write_jsonl(self.scratch(name), rows)
        self.commit(name, ledger, rows=len(rows), **known)

    def publish(
        self,
        *,
        key_parts: dict[str, Any],
        inputs: dict[str, Any],
        input_paths: dict[str, Any],
        unit: str,
        weights: str | None,
        versions: dict[str, str],
        seconds: dict[str, float],
        facts: dict[str, Any],
    ) -> Artifact:
        """Write the manifest and rename the hidden directory to the target."""
        receipts = [receipt for _, receipt in sorted(self.receipts().items())]
        files = tuple(receipt.file for receipt in receipts)
        ledger = merge((receipt.ledger for receipt in receipts), unit)
        ledger.check()
        total = dict(seconds)
        for receipt in receipts:
            for name, value in receipt.seconds.items():
                total[name] = total.get(name, 0.0) + value
        manifest = Manifest(
            schema=self.schema,
            stage=self.stage,
            key=self.key,
            key_parts=key_parts,
            digest=content_digest(self.schema, files),
            inputs=inputs,
            input_paths=input_paths,
            rows=sum(file.rows for file in files),
            ledger=ledger,
            files=files,
            weights=weights,
            versions=versions,
            hardware=hardware(),
            seconds={name: round(value, 3) for name, value in total.items()},
            facts=facts,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        write_atomically(self.directory / MANIFEST, with_checksum(manifest))
        return self.finish()

    def finish(self) -> Artifact:
        """From the manifest on: drop receipts and state, rename. Also what a crash in between is continued with."""
        try:
            for path in [*self.directory.glob(_receipt_name("*")), *self.directory.rglob("*.tmp")]:
                path.unlink(missing_ok=True)
            shutil.rmtree(self.directory / "state", ignore_errors=True)
            (self.directory / LOCK).unlink(missing_ok=True)
            fsync(self.directory)
            os.rename(self.directory, self.target)
        except OSError:
            # Without its lock file, another process may have finished it in this instant: then all is well.
            if not is_published(self.target, self.key):
                raise
            self.discard()
        (self.target / LOCK).unlink(missing_ok=True)
        fsync(self.target.parent)
        return Artifact.open(self.target, self.schema)

    def discard(self) -> None:
        """Delete the hidden directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def clear(self) -> None:
        """Where the target is published: delete what a killed process has left beside it, unless one works there."""
        with contextlib.suppress(UserError):
            if self.directory.exists():
                self.begin()
                self.discard()

    def abandon(self) -> None:
        """After a user's mistake: leave nothing behind, unless finished shards or a saved state are worth keeping."""
        worth = (path for pattern in WORTH_KEEPING for path in (self.directory / "state").glob(pattern))
        if not self.receipts() and not any(worth):
            self.discard()

    @property
    def complete(self) -> bool:
        """Whether a killed attempt had written the manifest already, so that only the rename is missing."""
        path = self.directory / MANIFEST
        try:
            return path.is_file() and bool(read_manifest(path.read_bytes()))
        except (FileNotFoundError, ValueError):  # renamed meanwhile, or torn
            return False


def partial_directory(target: Path, key: str) -> Path:
    """The hidden directory in which `target` is being made; one per key, so that keys never mix."""
    return target.parent / f".{target.name}.partial-{key[:16]}"


def _receipt_name(name: str) -> str:
    return f".receipt-{name.replace('/', '--')}.json"


def take_lock(file: IO[str], kind: int) -> None:
    """Lock an open file (fcntl.LOCK_EX or LOCK_SH) without waiting; the lock dies with its holder.

    Raises:
        BlockingIOError: another process holds it.
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise UserError(
                f"the file system of {Path(file.name).parent} has no file locks ({os.strerror(error.errno)}), by which "
                "processes keep out of each other's way. Mount it with locks that hold on all machines (NFS 4, Lustre "
                "with -o flock, BeeGFS with tuneUseGlobalFileLocks=true), or choose a path on another file system."
            ) from error
        raise


def appears(path: Path) -> bool:
    """Whether a file is there that another machine may have written just now.

    A file server's client may remember for up to a minute that it was not, unless it lists the folders.
    """
    if not path.exists():
        for folder in (path.parent.parent, path.parent):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.listdir(folder)
    return path.exists()


def process_name(pid: int | None = None) -> str:
    """What tells a process, by default this one, from all others on all machines that share a file system."""
    return f"{socket.gethostname()}-{pid or os.getpid()}"


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace a small file so that a reader sees the old or the new content; if `durable`, also after a power cut."""
    scratch = path.with_name(f"{path.name}.{process_name()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def hardware() -> dict[str, Any]:
    """Where it ran."""
    return {
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _share(path: Path) -> None:
    """Give a file the ordinary permissions: safetensors writes files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
