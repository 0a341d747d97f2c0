"""Demonstrations: conversations whose last message is the answer to imitate, from a file or a published stage."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from contracts.artifacts import MANIFEST, Artifact
from contracts.errors import UserError
from contracts.jsonl import read_jsonl
from contracts.records import DEMONSTRATIONS, JsonObjects, Message


class DemonstrationRow(msgspec.Struct):
    """A line of the user's file; columns beside these are ignored."""

    messages: tuple[Message, ...]
    prompt_id: str | None = None
    tools: JsonObjects | msgspec.UnsetType = msgspec.UNSET


def read_demonstrations(path: Path) -> Iterator[DemonstrationRow]:
    """Demonstrations of a JSONL file, or of published demonstrations."""
    files = Artifact.open(path, DEMONSTRATIONS).shards if (path / MANIFEST).is_file() else [path]
    if path.is_dir() and not (path / MANIFEST).is_file():
        raise UserError(f"demonstrations {path} is a directory without a manifest.json; give the JSONL file in it.")
    for file in files:
        yield from read_jsonl(file, DemonstrationRow)
