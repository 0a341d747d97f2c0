"""Reads the fields of a row other than its prompt: system message, input text, choices, tools, answer and tags."""

import json
import math
import re
from string import ascii_uppercase
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from contracts.conversations import read_tools
from contracts.errors import UserError
from contracts.layouts import SourceRow
from contracts.records import JsonObjects, Message


def surrogate_error(place: str, error: UnicodeEncodeError) -> UserError:
    """The error for a text that contains half of a surrogate pair."""
    around = error.object[max(0, error.start - 20) : error.end + 20]
    return UserError(
        f"{place}: {around!r} holds half of a surrogate pair, which is not valid text: it was cut in the middle of a "
        "character. Remove it, or the row."
    )


def with_system(row: SourceRow, messages: tuple[Message, ...], default: str | None = None) -> tuple[Message, ...]:
    """Add the row's system message, or else `default`, to a conversation that has none of its own.

    Raises:
        UserError: the conversation has a different one, or the row's is not text; the message names the place.
    """
    name, text = row.find("system")
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"{row.place}: the column {name!r} must be a text, which becomes the system message, found {text!r}. "
            "Set columns={system: null} if it is something else."
        )
    own = messages[0].content if messages and messages[0].role == "system" else None
    if text and own is not None and text.strip() != own.strip():
        raise UserError(
            f"{row.place}: the conversation has a system message, and the column {name!r} another one. Set "
            "columns={system: null} to keep the conversation's."
        )
    text = text or default
    return messages if own is not None or text is None else (Message("system", text), *messages)


def tools_of(row: SourceRow) -> JsonObjects | UnsetType:
    """The tools that the assistant may call; UserError if they are not a list of descriptions."""
    name, described = row.find("tools")
    return read_tools(described, f"{row.place}, column {name!r}") if described else UNSET


def with_input(
    row: SourceRow, column: str, messages: tuple[Message, ...]
) -> tuple[tuple[Message, ...], dict[str, str]]:
    """Append the row's input text and choices to the question; also return the choices by their letters."""
    question = messages[-1]
    named = row.layout.named
    name, text = row.find("input") if column != "prompt" or "input" in named else ("", None)
    if text is not None and not isinstance(text, str):
        if "input" in named:
            raise UserError(f"{row.place}: {name} must be a text, which follows the prompt's, found {text!r}.")
        row.forget(name)
        text = None
    parts = [question.content]
    if text and text.strip() and text.strip() not in question.content:
        parts.append(text)
    choices = _choices(row)
    if not all(re.search(rf"{re.escape(key)}[.):]\s*{re.escape(text)}", parts[0]) for key, text in choices.items()):
        parts.append("\n".join(f"{key}. {choice}" for key, choice in choices.items()))
    if len(parts) == 1:
        return messages, choices
    return (*messages[:-1], msgspec.structs.replace(question, content="\n\n".join(parts))), choices


def _choices(row: SourceRow) -> dict[str, str]:
    """The choices of a question by their letters, from a list, an object, or ARC's {text: [...], label: [...]}."""
    name, found = row.find("choices")
    if isinstance(found, dict) and isinstance(found.get("text"), list) and isinstance(found.get("label"), list):
        pairs = list(zip(map(str, found["label"]), found["text"], strict=False))
    elif isinstance(found, dict):
        pairs = [(str(letter), text) for letter, text in found.items() if text is not None]
    elif isinstance(found, list) and len(found) <= len(ascii_uppercase):
        pairs = list(zip(ascii_uppercase, found, strict=False))
    else:
        pairs = [("", found)] if found is not None else []
    texts = {letter: text if isinstance(text, str) else json.dumps(text, default=str) for letter, text in pairs}
    if "" in texts or len(texts) != len(pairs):
        raise UserError(
            f"{row.place}: the choices in the column {name!r} must be a list of texts, found {found!r}. Set "
            "columns={choices: null} if they are something else."
        )
    return texts


def answer_of(row: SourceRow, choices: dict[str, str]) -> str | None:
    """The known answer as text: the letter for the index of a choice, JSON for other values that are not text."""
    name, value = row.find("answer")
    if value is None or isinstance(value, str):
        return value
    if choices and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(choices):
            raise UserError(
                f"{row.place}: {name} is {value}, but the {len(choices)} choices are counted from 0. Correct it."
            )
        return list(choices)[value]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{row.place}: {name} is {value}, which cannot be an answer. Leave it empty (null), or correct it."
        )
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise UserError(f"{row.place}: {name} cannot be kept as JSON: {error}. Make it a text.") from error


def _plain(value: Any) -> str:
    """Convert a table's dates and decimal numbers to text."""
    if isinstance(value, bytes):
        raise TypeError("it holds bytes")
    return str(value)


def tags_of(row: SourceRow) -> tuple[str, ...]:
    """The row's tags; a string counts as one tag."""
    name, tags = row.find("tags")
    tags = [tags] if isinstance(tags, str) else tags or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise UserError(
            f"{row.place}: {name} must be a list of strings, found {tags!r}. Set columns={{tags: null}} to leave it "
            "out."
        )
    return tuple(tags)
