"""Reads demonstrations, conversations that end with the answer to imitate, from data sets of various layouts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from contracts.artifacts import Artifact
from contracts.conversations import read_messages
from contracts.fields import answer_of, surrogate_error, tools_of, with_input, with_system
from contracts.jsonl import encode
from contracts.layouts import TEXTS, Layout, SourceRow
from contracts.manifest import MANIFEST
from contracts.records import DEMONSTRATIONS, JsonObjects, Message
from contracts.sources import read_rows


class DemonstrationRow(msgspec.Struct):
    """One demonstration as it was read; its last message may not be an answer."""

    messages: tuple[Message, ...]
    prompt_id: str | None = None
    tools: JsonObjects | UnsetType = UNSET


def read_demonstrations(source: Path) -> "Demonstrations":
    """Open the demonstrations of a file, a directory, a data set or an artifact."""
    return Demonstrations(source)


class Demonstrations:
    """The demonstrations of one source, with counts of the columns that were not read."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.layout = Layout({})

    def __iter__(self) -> Iterator[DemonstrationRow]:
        """Yield all demonstrations, in the order of the source.

        Raises:
            UserError: the source cannot be read, or a row is not a conversation; the message names the place.
        """
        if (self.source / MANIFEST).is_file():
            Artifact.open(self.source, DEMONSTRATIONS)
        for place, values in read_rows(str(self.source), "train"):
            yield self.read(values, place)

    def read(self, values: dict[str, Any], place: str) -> DemonstrationRow:
        """Read the conversation of one row, including the answer if that is in a column of its own."""
        row = self.layout.row(values, place)
        column, messages = row.prompt()
        choices: dict[str, str] = {}
        if column in TEXTS and messages:
            messages, choices = with_input(row, column, messages)
        messages = with_system(row, messages)
        if messages and messages[-1].role != "assistant":
            messages = (*messages, *_response(row, column, choices))
        _, identity = row.find("id")
        found = DemonstrationRow(messages, None if identity is None else str(identity), tools_of(row))
        self.layout.done(row)
        try:
            encode(found)
        except UnicodeEncodeError as error:
            raise surrogate_error(place, error) from error
        return found


def _response(row: SourceRow, column: str, choices: dict[str, str]) -> tuple[Message, ...]:
    """The answer from a column of its own, for a question also the known answer; empty if there is none."""
    name, value = row.find("response")
    if name and not isinstance(value, str):
        return read_messages(value, row.place, name, row.unread)
    text = value if name else answer_of(row, choices) if column in TEXTS else None
    return () if text is None else (Message("assistant", text),)
