"""Reads and writes the manifest of an artifact, and the list of files that `pipeline gc` has deleted from it."""

import hashlib
from pathlib import PurePosixPath
from typing import Any, TypeVar

import msgspec

from contracts.fingerprint import digest
from contracts.ledger import Ledger
from contracts.records import Schema

MANIFEST = "manifest.json"


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One published file; `rows` is 0 for files that are not JSONL."""

    path: str
    sha256: str
    bytes: int
    rows: int = 0


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The description of an artifact, and the proof that it is complete."""

    schema: Schema
    stage: str
    key: str
    """The stage key: same key, same content."""
    key_parts: dict[str, Any]
    """The data that the key is a digest of, to explain why two keys differ."""
    digest: str
    """Digest of the schema and the files alone; stage keys downstream use it."""
    inputs: dict[str, Any]
    """Digest (or digests) of each input."""
    input_paths: dict[str, Any]
    rows: int
    ledger: Ledger
    files: tuple[File, ...]
    weights: str | None
    """Fingerprint of a checkpoint's weights, or of the weights that generated the rows."""
    versions: dict[str, str]
    hardware: dict[str, Any]
    """The hardware that the stage ran on, and its peak usage (contracts/hardware.py)."""
    seconds: dict[str, float]
    """Time by phase: prepare (keys, locks), import, load, compute, wait (for shards of a stage that it follows), save,
    check (until the inputs are verified); total covers everything."""
    facts: dict[str, Any]
    """The stage's own results, for example its metrics."""
    created: str
    checksum: str = ""
    """SHA-256 of this file's bytes with this field empty."""


class Released(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files of an artifact that `pipeline gc` deleted."""

    files: tuple[str, ...]
    reason: str
    time: str
    checksum: str = ""
    """SHA-256 of this file's bytes with this field empty."""


D = TypeVar("D", Manifest, Released)


def read_manifest(content: bytes) -> Manifest:
    """Decode a manifest.json.

    Raises:
        ValueError: it is not a manifest, its checksum is wrong, or it lists a file outside of its directory.
    """
    manifest = checked(content, Manifest)
    for file in manifest.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            raise ValueError(f"it names the file {file.path!r}, which is not inside its directory")
    return manifest


def checked(content: bytes, record_type: type[D]) -> D:
    """Decode a record that holds its own checksum; ValueError if it cannot be decoded or the checksum is wrong."""
    record = msgspec.json.decode(content, type=record_type)
    blank = content.replace(b'"checksum": "%s"' % record.checksum.encode(), b'"checksum": ""')
    if hashlib.sha256(blank).hexdigest() != record.checksum:
        raise ValueError("its content does not fit its own checksum")
    return record


def with_checksum(record: Manifest | Released) -> bytes:
    """Encode a record together with its own checksum."""

    def text(checksum: str) -> bytes:
        found = msgspec.structs.replace(record, checksum=checksum)
        return msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"

    return text(hashlib.sha256(text("")).hexdigest())


def content_digest(schema: Schema, files: tuple[File, ...]) -> str:
    """Digest of an artifact's content, its schema and files; when, where and how fast it was computed do not enter."""
    return digest({"schema": [schema.name, schema.version], "files": sorted((f.path, f.sha256) for f in files)})
