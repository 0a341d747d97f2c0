"""Streaming: a stage reads an input shard by shard as it is finished, while the stage that makes it still runs.

A receipt in the hidden directory of the maker says that a shard is finished, and what its bytes are. What is made from
it bears that in its own receipt (`made_from`), and is made again where the input is published with other bytes. So it
does not matter who is killed when, and nothing is published that was not made from what its inputs' digests say.

A stage key holds the digests of all inputs, so that of a stage that follows is not known before its input is published.
Its hidden directory is therefore named by another key, in which the key of that input stands for its content: whether
an attempt follows or finds everything published, it finds what earlier attempts have finished.
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
from contracts.files import appears
from contracts.fingerprint import digest
from contracts.jsonl import decode_jsonl, read_jsonl
from contracts.manifest import MANIFEST
from contracts.publication import Receipt, finished_in, partial_directory, receipt_in
from contracts.records import Schema

R = TypeVar("R")
FOLLOW = "RATCHET_FOLLOW"
"""Environment variable: the inputs that are not published yet and that this stage may follow (`announcement`)."""
LOOK_SECONDS = 0.2
"""How often a stage that waits looks for another shard."""


class Maker(msgspec.Struct, frozen=True):
    """A stage that is at work on an input."""

    key: str
    """What it will publish."""
    hidden_key: str
    """What its hidden directory is named by."""


def announcement(makers: Mapping[str, Maker]) -> str:
    """The value of `FOLLOW` for makers by the path of what they will publish."""
    return msgspec.json.encode(makers).decode()


def maker_of(path: Path) -> Maker | None:
    """The stage that makes an input now, as far as this process was told."""
    announced = os.environ.get(FOLLOW)
    return msgspec.json.decode(announced, type=dict[str, Maker]).get(str(path)) if announced else None


def maker_key(path: Path) -> str | None:
    """The key under which an input is published, or is being made; None where it is no artifact."""
    if (path / MANIFEST).is_file():
        return Artifact.open(path).manifest.key
    maker = maker_of(path)
    return maker.key if maker is not None else None


def hidden_key(parts: Mapping[str, Any], field: str | None, maker: str | None) -> str:
    """What the hidden directory of a stage is named by, given what its stage key is a digest of.

    Args:
        field: the input that it can follow, if any.
        maker: the key of that input; None where it is no artifact.
    """
    if field is None or maker is None:
        return digest(parts)
    return digest({**parts, "inputs": {**parts["inputs"], field: {"key": maker}}})


class MadeFrom:
    """Whether a shard was made from the shard of the same name that an input is published with."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._published: dict[str, str] | None = None

    def __call__(self, receipt: Receipt) -> bool:
        """True as long as the input is not published: nobody knows."""
        if self._published is None and (self._path / MANIFEST).is_file():
            self._published = {file.path: file.sha256 for file in Artifact.open(self._path).manifest.files}
        if self._published is None:
            return True
        return receipt.made_from is not None and receipt.made_from == self._published.get(receipt.file.path)


class Source:
    """The shards of an input that is published, or that a stage still makes which this one may follow."""

    def __init__(self, path: Path, *schemas: Schema) -> None:
        """`schemas`: those that it may have.

        Raises:
            UserError: nothing is published there, and nobody makes it.
        """
        self.path = path
        self._schemas = schemas
        self._maker = maker_of(path)
        self._artifact: Artifact | None = None
        self._intact: dict[str, str] = {}
        self._read: dict[str, str] = {}
        self.look()

    def look(self) -> bool:
        """Whether it is published by now.

        Raises:
            TransientError: under another key than was announced.
        """
        if self._artifact is None and (self._maker is None or appears(self.path / MANIFEST)):
            artifact = Artifact.open(self.path, *self._schemas)
            if self._maker is not None and artifact.manifest.key != self._maker.key:
                raise TransientError(
                    f"{self.path} was published under the key {artifact.manifest.key[:12]}, but this stage was to "
                    f"follow {self._maker.key[:12]}. The next attempt reads what is published."
                )
            self._artifact = artifact
        return self._artifact is not None

    def wait(self) -> None:
        """Let a moment pass until the next look."""
        beat()
        time.sleep(LOOK_SECONDS)

    @property
    def whole(self) -> bool:
        """Whether it was published at the last look."""
        return self._artifact is not None

    @property
    def artifact(self) -> Artifact:
        """What is published; only where it is."""
        assert self._artifact is not None
        return self._artifact

    def names(self) -> list[str]:
        """The shards that can be read: those found finished so far; once it is published all, the largest first."""
        if self._artifact is not None:
            sizes = {file.path: file.bytes for file in self._artifact.manifest.files}
            return sorted((shard.name for shard in self._artifact.shards), key=lambda name: (-sizes[name], name))
        for name in finished_in(self._hidden):
            if name.startswith("shard-") and name not in self._intact:
                receipt, content = receipt_in(self._hidden, name), self._content(name)
                if receipt is not None and content is not None and _sha256(content) == receipt.file.sha256:
                    self._intact[name] = receipt.file.sha256  # else its maker will see it, and make it again
        return list(self._intact)

    def rows(self, name: str, record_type: type[R]) -> list[R]:
        """The records of one shard.

        Raises:
            TransientError: it is not what it was when it was found.
        """
        if self._artifact is not None:
            self._read[name] = next(file.sha256 for file in self._artifact.manifest.files if file.path == name)
            return list(read_jsonl(self.path / name, record_type))
        content = self._content(name)
        if content is None or _sha256(content) != self._intact[name]:
            raise TransientError(f"{self.path}: {name} is being made again by the stage that this one follows.")
        self._read[name] = self._intact[name]
        return list(decode_jsonl(self.path / name, io.BytesIO(content), record_type))

    def made_from(self, name: str) -> str | None:
        """SHA-256 of a shard as it was read: what another one of the same name is made from."""
        if name.startswith("shard-") and name not in self._read:
            raise AssertionError(f"{name} is made from {self.path / name}, which was not read through Source.rows")
        return self._read.get(name)

    @property
    def _hidden(self) -> Path:
        assert self._maker is not None
        return partial_directory(self.path, self._maker.hidden_key)

    def _content(self, name: str) -> bytes | None:
        for folder in (self._hidden, self.path):  # it may be published in between
            try:
                return (folder / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
