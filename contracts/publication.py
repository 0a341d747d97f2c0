"""Writes and publishes an artifact: shards with receipts, then a manifest, then one rename.

A stage writes into a hidden directory next to its target, shard by shard. Each finished shard gets a receipt, so
that a killed stage loses its current shard and nothing else. `publish` checks the counts, writes `manifest.json`
last, flushes everything to the disk and renames.

States that a crash can leave, and what the next attempt does:
  hidden directory, shards with receipts           keeps them, computes the rest
  a `*.tmp` file, or a shard without its receipt   deletes it
  hidden directory with a manifest                 finishes the rename
  the target                                       nothing

A stage may read the finished shards of another while that one still computes the rest (contracts/following.py).
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from contracts.artifacts import Artifact, is_published
from contracts.errors import UserError
from contracts.files import fsync, process_name, write_atomically
from contracts.fingerprint import file_sha256
from contracts.hardware import hardware
from contracts.jsonl import write_jsonl
from contracts.ledger import Ledger, merge
from contracts.locks import LOCK, DirectoryLock
from contracts.manifest import MANIFEST, File, Manifest, content_digest, read_manifest, with_checksum
from contracts.records import Schema

WORTH_KEEPING = ("*.safetensors", "judged-*.jsonl", "paid-*.jsonl")
"""Files of the folder `state` that are kept after a user's mistake, because they were expensive to compute."""
MOST_NAMED = 3
"""Maximum number of shards that a message lists."""


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The record of one finished shard."""

    file: File
    ledger: Ledger
    seconds: dict[str, float] = {}
    facts: dict[str, Any] = {}
    made_from: str | None = None
    """SHA-256 of the input shard that it was computed from, for an input that is read shard by shard."""


class Publication:
    """The only way to publish: shards with receipts, then a manifest, then a rename."""

    def __init__(
        self,
        target: Path,
        schema: Schema,
        stage: str,
        key: str | None,
        *,
        hidden_key: str = "",
        fits: Callable[[Receipt], bool] | None = None,
    ) -> None:
        """Prepare to publish under a stage key.

        Args:
            key: None as long as it is unknown (contracts/following.py).
            hidden_key: the key that names the hidden directory; by default `key`.
            fits: whether a finished shard was computed from the stage's current input; None if the key implies it.
        """
        self.target = target
        self.schema = schema
        self.stage = stage
        self.key = key
        self.made_from: Callable[[str], str | None] = lambda name: None
        """Maps a shard's name to the digest of the input shard that it was computed from, for its receipt."""
        self.directory = partial_directory(target, hidden_key or key or "")
        self._fits = fits
        self._lock = DirectoryLock(self.directory, target)

    def begin(self, patience: float = 0.0) -> None:
        """Create the hidden directory, or take it over from an ended process, and clean up after a crash.

        The caller becomes the only process that may write into it.

        Args:
            patience: seconds to wait for the lock. On a shared file system the lock of a dead machine is held until
                its lease ends.

        Raises:
            UserError: another process holds the lock, and `patience` is 0.
            TransientError: another process still holds the lock after `patience`.
        """
        self._lock.take_when_free(lambda: self._lock.take(fcntl.LOCK_EX), patience)
        with contextlib.suppress(FileNotFoundError):  # the previous holder of the lock has just published
            if not self.complete or self._damaged():
                self._clear_leftovers(self._intact)

    def join(self, patience: float) -> None:
        """Create the hidden directory, or share it with other tasks that compute shards and do not publish.

        The first task cleans up what a crash left. File contents are verified later, by the publisher, because other
        tasks would have to wait here.

        Raises:
            TransientError: another process holds the directory exclusively for longer than `patience` seconds.
        """
        self._lock.take_when_free(self._take_shared_lock, patience)

    def _take_shared_lock(self) -> bool:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            if self._lock.take(fcntl.LOCK_EX) and not self.complete:
                self._clear_leftovers()
        return self._lock.take(fcntl.LOCK_SH)

    def _damaged(self) -> bool:
        """Whether a file differs from an existing manifest, for example after a power failure."""
        path = self.directory / MANIFEST
        found = Artifact(self.directory, read_manifest(path.read_bytes())).damage()
        return bool(found) and path.exists()  # and it was not renamed in the meantime

    def _clear_leftovers(self, intact: Callable[[Receipt], bool] = lambda receipt: True) -> None:
        """Delete scratch files, files without a receipt or that are not `intact`, and receipts without such a file.

        Shards that were computed from a different input are deleted as well.
        """
        self.drop_outdated()
        known = {name for name, receipt in self.receipts().items() if intact(receipt)}
        known |= {_receipt_name(name) for name in known}
        for path in sorted(self.directory.rglob("*")):  # a receipt before its file
            name = path.relative_to(self.directory).as_posix()
            if path.is_file() and name not in known and name != LOCK and not name.startswith("state/"):
                path.unlink()

    def drop_outdated(self) -> list[str]:
        """Delete the finished shards that were computed from a different input than the current one, and print that.

        The caller must be the only process that computes shards.

        Returns:
            The names of the deleted shards.
        """
        if self._fits is None:
            return []
        dropped = [name for name, receipt in self.receipts().items() if not self._fits(receipt)]
        for name in dropped:
            (self.directory / _receipt_name(name)).unlink(missing_ok=True)
            (self.directory / name).unlink(missing_ok=True)
        if dropped:
            names = ", ".join(dropped[:MOST_NAMED]) + (", ..." if len(dropped) > MOST_NAMED else "")
            print(f"{len(dropped)} shards were computed from a different input, and are recomputed: {names}")
        return dropped

    def _intact(self, receipt: Receipt) -> bool:
        return file_sha256(self.directory / receipt.file.path) == receipt.file.sha256

    @property
    def state(self) -> Path:
        """The folder for state from which a killed stage resumes; it is never published."""
        path = self.directory / "state"
        path.mkdir(exist_ok=True)
        return path

    def receipts(self) -> dict[str, Receipt]:
        """Receipts of the finished files by name; files whose receipt or content is incomplete are left out."""
        found = (_read_receipt(path) for path in sorted(self.directory.glob(_receipt_name("*"))))
        return {receipt.file.path: receipt for receipt in found if receipt is not None}

    def receipt(self, name: str) -> Receipt | None:
        """The receipt of one file, if it is finished."""
        return receipt_in(self.directory, name)

    def finished(self, names: Iterable[str]) -> set[str]:
        """The subset of `names` that have a receipt, from one directory listing: cheap for many files."""
        try:
            there = set(os.listdir(self.directory))
        except FileNotFoundError:  # published meanwhile
            return set()
        return {name for name in names if _receipt_name(name) in there}

    def scratch(self, name: str) -> Path:
        """The temporary path at which to write the file `name`, before `commit` renames it."""
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
        """Make the scratch file one of the artifact's files, `name`, and write its receipt."""
        ledger.check()
        scratch = self.scratch(name)
        _share(scratch)
        fsync(scratch)
        file = File(name, file_sha256(scratch), scratch.stat().st_size, rows)
        os.replace(scratch, self.directory / name)
        receipt = Receipt(file, ledger, seconds or {}, facts or {}, self.made_from(name))
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
        assert self.key is not None
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
        """Delete receipts and state, and rename; also resumes a publication that crashed after its manifest."""
        try:
            for path in [*self.directory.glob(_receipt_name("*")), *self.directory.rglob("*.tmp")]:
                path.unlink(missing_ok=True)
            shutil.rmtree(self.directory / "state", ignore_errors=True)
            (self.directory / LOCK).unlink(missing_ok=True)
            fsync(self.directory)
            os.rename(self.directory, self.target)
        except OSError:
            # Once the lock file is deleted, another process may have finished the rename: that is fine.
            if self.key is None or not is_published(self.target, self.key):
                raise
            self.discard()
        (self.target / LOCK).unlink(missing_ok=True)
        fsync(self.target.parent)
        return Artifact.open(self.target, self.schema)

    def discard(self) -> None:
        """Delete the hidden directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def clear(self) -> None:
        """After the target is published: delete a hidden directory that a killed process left, unless it is locked."""
        with contextlib.suppress(UserError):
            if self.directory.exists():
                self.begin()
                self.discard()

    def abandon(self) -> None:
        """After a user's mistake: delete the hidden directory, unless it has finished shards or state worth keeping."""
        worth = (path for pattern in WORTH_KEEPING for path in (self.directory / "state").glob(pattern))
        if not self.receipts() and not any(worth):
            self.discard()

    @property
    def complete(self) -> bool:
        """Whether a killed attempt wrote the manifest under this key, so that only the rename is missing."""
        path = self.directory / MANIFEST
        try:
            return path.is_file() and read_manifest(path.read_bytes()).key == self.key
        except (FileNotFoundError, ValueError):  # renamed meanwhile, or torn
            return False


def partial_directory(target: Path, key: str) -> Path:
    """The hidden directory in which `target` is written; one per stage key, so that keys never mix."""
    return target.parent / f".{target.name}.partial-{key[:16]}"


def receipt_in(directory: Path, name: str) -> Receipt | None:
    """The receipt of one file in a hidden directory, if it is finished."""
    return _read_receipt(directory / _receipt_name(name))


def finished_in(directory: Path) -> list[str]:
    """Sorted names of the files in a hidden directory that have a receipt, from one directory listing."""
    prefix, suffix = _receipt_name("*").split("*")
    try:
        there = os.listdir(directory)
    except FileNotFoundError:  # not begun yet, or published in the meantime
        return []
    found = (name[len(prefix) : -len(suffix)] for name in there if name.startswith(prefix) and name.endswith(suffix))
    return sorted(found)


def _read_receipt(path: Path) -> Receipt | None:
    try:
        receipt = msgspec.json.decode(path.read_bytes(), type=Receipt)
        size = (path.parent / receipt.file.path).stat().st_size
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return receipt if size == receipt.file.bytes else None


def _receipt_name(name: str) -> str:
    return f".receipt-{name.replace('/', '--')}.json"


def _share(path: Path) -> None:
    """Give a file the default permissions: safetensors writes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
