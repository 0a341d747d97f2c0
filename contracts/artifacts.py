"""Reads and verifies published directories (artifacts); the manifest is the only source of truth.

`pipeline gc` may compress an artifact's rows (FILE.gz instead of FILE) and delete files, which it then lists in
`released.json`. The manifest stays, so that a stage whose files were deleted still counts as published.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from contracts.errors import UserError
from contracts.files import matches
from contracts.fingerprint import ADAPTER, RELEASED, digest, file_sha256, weights_fingerprint
from contracts.jsonl import COMPRESSED, open_stored, read_jsonl
from contracts.manifest import MANIFEST, File, Manifest, Released, checked, content_digest, read_manifest
from contracts.records import Schema

R = TypeVar("R")


class Artifact:
    """A published directory with its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path, *schemas: Schema) -> "Artifact":
        """Open a published directory.

        Raises:
            UserError: nothing is published there, or the artifact's schema is none of `schemas`.
        """
        try:
            manifest = _manifest_in(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            why = "is not published (it has no manifest.json)" if path.exists() else "does not exist"
            raise UserError(f"{path} {why}. Run the stage that makes it first.") from error
        if schemas and manifest.schema not in schemas:
            wanted = " or ".join(f"{schema.name} v{schema.version}" for schema in schemas)
            found = f"{manifest.schema.name} v{manifest.schema.version}"
            raise UserError(f"{path} holds {found}; expected {wanted}.")
        return cls(path, manifest)

    @property
    def shards(self) -> list[Path]:
        """The JSONL files with the rows, in order; `read_jsonl` also reads compressed ones."""
        return [self.path / file.path for file in self.manifest.files if file.path.startswith("shard-")]

    def rows(self, record_type: type[R]) -> Iterator[R]:
        """Read all records, in order."""
        for shard in self.shards:
            yield from read_jsonl(shard, record_type)

    def damage(self) -> list[str]:
        """The differences between the directory and its manifest; empty if it is intact."""
        released = self.released
        found = [
            problem for file in self.manifest.files if file.path not in released and (problem := self.damage_of(file))
        ]
        if content_digest(self.manifest.schema, self.manifest.files) != self.manifest.digest:
            found.append(f"{self.path / MANIFEST}: the digest does not fit the files listed")
        return found

    def damage_of(self, file: File) -> str | None:
        """The difference between one file and the manifest, or None."""
        path = self.path / file.path
        stored = path if path.exists() else path.with_name(path.name + COMPRESSED)
        if stored.exists() and not stored.is_file():
            return f"{stored}: it is not a regular file"
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
        """Names of the files that `pipeline gc` has deleted."""
        path = self.path / RELEASED
        if not path.is_file():
            return frozenset()
        try:
            return frozenset(checked(path.read_bytes(), Released).files)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}. Delete {self.path} and run its stage again.") from error


def _manifest_in(path: Path) -> Manifest:
    """Read the manifest of a directory.

    Raises:
        FileNotFoundError: it has none.
        UserError: it is damaged.
    """
    try:
        return read_manifest((path / MANIFEST).read_bytes())
    except ValueError as error:
        raise UserError(f"{path / MANIFEST} is damaged: {error}. Delete {path} and run its stage again.") from error


def artifact_of(path: Path) -> Artifact | None:
    """The artifact at `path`, or the one that contains it, if any."""
    for directory in [path, *path.parents]:
        if (directory / MANIFEST).is_file() and (directory == path or _is_manifest(directory / MANIFEST)):
            return Artifact.open(directory)
    return None


def _is_manifest(file: Path) -> bool:
    """Whether a manifest.json belongs to an artifact, perhaps a damaged one; other tools use the name too."""
    try:
        data = json.loads(file.read_bytes())
    except ValueError:
        return True
    return isinstance(data, dict) and len({"schema", "key", "files"} & data.keys()) > 1  # one may be damaged


def is_published(target: Path, key: str) -> bool:
    """Whether `target` is published under the stage key `key`.

    Raises:
        UserError: it is not an artifact, or has another key.
    """
    try:
        if MANIFEST not in os.listdir(target):
            raise NotADirectoryError
        found = _manifest_in(target)
    except FileNotFoundError:  # or another process has just moved it away
        return False
    except (NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"output {target} exists and is not an artifact. Choose another output, or remove it."
        ) from error
    if found.key != key:
        raise UserError(
            f"output {target} was published by another run (stage {found.stage}, key {found.key[:12]}, this is "
            f"{key[:12]}). Choose another output, or remove it to compute it again."
        )
    return True


def model_fingerprint(model: Path) -> str:
    """The fingerprint of a model; for a published checkpoint, the recorded one: its files are verified elsewhere."""
    if (model / MANIFEST).is_file() and (recorded := Artifact.open(model).manifest.weights):
        return recorded
    return weights_fingerprint(model)


def input_digest(source: Path | str) -> str:
    """Digest of the content of an artifact, file, pattern, model or other directory; of a Hub id, that of its name.

    Raises:
        UserError: the path does not exist.
    """
    if str(source).startswith("hf:"):
        place = re.split("[:@]", str(source).removeprefix("hf:"))[0]
        local = place.startswith(("/", ".")) and Path(place).is_dir()  # then `datasets` reads that directory
        return digest([str(source), input_digest(place)] if local else str(source))
    path = Path(source)
    if (path / MANIFEST).is_file():
        return Artifact.open(path).manifest.digest
    if path.is_file():
        return file_sha256(path)
    if found := matches(path):
        return digest([[file.name, file_sha256(file)] for file in found])
    if not path.is_dir():
        raise UserError(f"input {path} does not exist. Give a file, a published directory, a model, or hf:ORG/NAME.")
    if (path / "config.json").is_file() and not (path / ADAPTER).is_file():
        return weights_fingerprint(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    try:
        return digest({file.relative_to(path).as_posix(): file_sha256(file) for file in files})
    except FileNotFoundError as error:
        raise UserError(f"input {path} changed while it was read: {error.filename} was removed. Try again.") from error


def input_damage(source: Path) -> list[str]:
    """The differences between a stage's input and its manifest, including deleted files; none if it is no artifact."""
    artifact = artifact_of(source)
    if artifact is None:
        return []
    wanted = [file for file in artifact.manifest.files if (artifact.path / file.path).is_relative_to(source)]
    released = artifact.released
    if gone := [file.path for file in wanted if file.path in released]:
        return [f"{artifact.path}: {', '.join(gone)} was deleted by `pipeline gc`"]
    return [problem for file in wanted if (problem := artifact.damage_of(file))]
