"""Streaming: a stage reads an input's shards as they are finished, while the stage that makes the input still runs.

A receipt in the producer's hidden directory says that a shard is finished, and has its digest. The receipt of a shard
that is computed from it records this digest (`made_from`); if the input is published with a different one, the shard is
recomputed. So either stage may be killed at any time, and everything that is published was computed from inputs with
the digests in its manifest.

A stage key contains the digests of all inputs, so the key of a following stage is unknown until its input is published.
Therefore its hidden directory is named by a different key, in which the input's stage key stands for its content. So
every attempt finds the shards that earlier attempts have finished, whether the input is published by then or not.
"""

import hashlib
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from contracts.artifacts import Artifact
from contracts.attempt import beat
from contracts.errors import TransientError
from contracts.files import exists_uncached
from contracts.fingerprint import digest
from contracts.jsonl import decode_jsonl, read_jsonl
from contracts.manifest import MANIFEST
from contracts.publication import Receipt, finished_in, partial_directory, receipt_in
from contracts.records import Schema

R = TypeVar("R")
FOLLOW = "RATCHET_FOLLOW"
"""Environment variable: the unpublished inputs that this stage may follow (`announcement`)."""
POLL_SECONDS = 0.2
"""Interval at which a waiting stage looks for another shard."""


class Producer(msgspec.Struct, frozen=True):
    """A running stage that makes an input of another one."""

    key: str
    """The stage key under which it will publish."""
    hidden_key: str
    """The key that names its hidden directory."""


def announcement(producers: Mapping[str, Producer]) -> str:
    """The value of `FOLLOW` for producers, by the path at which each will publish."""
    return msgspec.json.encode(producers).decode()


def producer_of(path: Path) -> Producer | None:
    """The running stage that makes an input, according to `FOLLOW`; None if there is none."""
    announced = os.environ.get(FOLLOW)
    return msgspec.json.decode(announced, type=dict[str, Producer]).get(str(path)) if announced else None


def producer_key(path: Path) -> str | None:
    """The stage key of an input that is published or is being made; None if it is not an artifact."""
    if (path / MANIFEST).is_file():
        return Artifact.open(path).manifest.key
    producer = producer_of(path)
    return producer.key if producer is not None else None


def hidden_key(parts: Mapping[str, Any], field: str | None, producer: str | None) -> str:
    """The key that names a stage's hidden directory.

    Args:
        parts: the data that the stage key is a digest of.
        field: the input that the stage can follow, if any.
        producer: the stage key of that input; None if it is not an artifact.
    """
    if field is None or producer is None:
        return digest(parts)
    return digest({**parts, "inputs": {**parts["inputs"], field: {"key": producer}}})


class MatchesInput:
    """Checks whether a shard was computed from the published content of the input's shard with the same name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._published: dict[str, str] | None = None

    def __call__(self, receipt: Receipt) -> bool:
        """Whether the receipt names the published digest; also true as long as the input is not published."""
        if self._published is None and (self._path / MANIFEST).is_file():
            self._published = {file.path: file.sha256 for file in Artifact.open(self._path).manifest.files}
        if self._published is None:
            return True
        return receipt.made_from is not None and receipt.made_from == self._published.get(receipt.file.path)


class Source:
    """The shards of an input that is published, or is still being made by a stage that this one follows."""

    def __init__(self, path: Path, *schemas: Schema) -> None:
        """Open an input, which must have one of `schemas`.

        Raises:
            UserError: nothing is published at `path`, and no running stage makes it.
        """
        self.path = path
        self._schemas = schemas
        self._producer = producer_of(path)
        self._artifact: Artifact | None = None
        self._intact: dict[str, str] = {}
        self._read: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Look whether the input is published by now.

        Raises:
            TransientError: it is published under a different key than was announced.
        """
        if self._artifact is None and (self._producer is None or exists_uncached(self.path / MANIFEST)):
            artifact = Artifact.open(self.path, *self._schemas)
            if self._producer is not None and artifact.manifest.key != self._producer.key:
                raise TransientError(
                    f"{self.path} was published under the key {artifact.manifest.key[:12]}, but this stage was to "
                    f"follow {self._producer.key[:12]}. The next attempt reads what is published."
                )
            self._artifact = artifact
        return self._artifact is not None

    def wait(self) -> None:
        """Wait for a moment before the next look."""
        beat()
        time.sleep(POLL_SECONDS)

    @property
    def whole(self) -> bool:
        """Whether the input was published at the last look."""
        return self._artifact is not None

    @property
    def artifact(self) -> Artifact:
        """The published input; only if `whole`."""
        assert self._artifact is not None
        return self._artifact

    def names(self) -> list[str]:
        """Names of the shards that can be read: those that are finished so far, or all once the input is published,
        largest first."""
        if self._artifact is not None:
            sizes = {file.path: file.bytes for file in self._artifact.manifest.files}
            return sorted((shard.name for shard in self._artifact.shards), key=lambda name: (-sizes[name], name))
        for name in finished_in(self._hidden):
            if name.startswith("shard-") and name not in self._intact:
                receipt, content = receipt_in(self._hidden, name), self._content(name)
                if receipt is not None and content is not None and _sha256(content) == receipt.file.sha256:
                    self._intact[name] = receipt.file.sha256  # otherwise the producer will notice, and make it again
        return list(self._intact)

    def rows(self, name: str, record_type: type[R]) -> list[R]:
        """Read the records of one shard.

        Raises:
            TransientError: its content has changed since it was found.
        """
        if self._artifact is not None:
            self._read[name] = next(file.sha256 for file in self._artifact.manifest.files if file.path == name)
            return list(read_jsonl(self.path / name, record_type))
        content = self._content(name)
        if content is None or _sha256(content) != self._intact[name]:
            raise TransientError(f"{self.path}: {name} is being recomputed by the stage that this one follows.")
        self._read[name] = self._intact[name]
        return list(decode_jsonl(self.path / name, io.BytesIO(content), record_type))

    def made_from(self, name: str) -> str | None:
        """SHA-256 of the input's shard `name` as it was read, for the receipt of the shard that is computed from it."""
        if name.startswith("shard-") and name not in self._read:
            raise AssertionError(f"{name} is made from {self.path / name}, which was not read through Source.rows")
        return self._read.get(name)

    @property
    def _hidden(self) -> Path:
        assert self._producer is not None
        return partial_directory(self.path, self._producer.hidden_key)

    def _content(self, name: str) -> bytes | None:
        for folder in (self._hidden, self.path):  # it may be published between the two
            try:
                return (folder / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
