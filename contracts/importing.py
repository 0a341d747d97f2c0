"""The prompts stage: from the rows that people have to prompts, each with the hash of its content as its identity."""

import json
import math
import random
import re
from string import ascii_uppercase
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from contracts.artifacts import Artifact
from contracts.conversations import read_tools
from contracts.errors import UserError
from contracts.jsonl import encode
from contracts.layouts import TEXTS, Layout, Row, without_answer
from contracts.ledger import Ledger
from contracts.prompts import PromptsConfig, prompt_id
from contracts.records import PROMPTS, Message, Prompt
from contracts.seeds import derive_seed
from contracts.sources import read_rows
from contracts.stage import Context, Outcome

SHOWN = 8


def run(config: PromptsConfig, context: Context) -> Outcome:
    """Publish the prompts of a source, each once."""
    excluded = {
        prompt_id(held.messages, held.tools)
        for path in config.exclude
        for held in Artifact.open(path, PROMPTS).rows(Prompt)
    }
    reader, ledger, turns_removed = PromptReader(config), Ledger("rows"), 0
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for place, row in read_rows(str(config.source), config.split):
        prompt, content, removed = reader.read(row, place)
        turns_removed += removed
        if prompt is None:
            ledger.drop("empty")
            continue
        # A given identity that repeats is as wrong as a conversation that does.
        known = {f"conversation {content}": place, f"{reader.id_column} {prompt.prompt_id}": place}
        again = [name for name in known if name in places]
        if again and config.duplicates == "error":
            raise UserError(
                f"{place}: the same {again[0]} as in {places[again[0]]}. Remove one of them, or set duplicates=drop."
            )
        if again:
            ledger.drop("duplicate")
            continue
        places.update(known)
        if content in excluded:
            ledger.drop("held_out")
            continue
        prompts.append(prompt)
    reader.layout.require_named(str(config.source))
    ledger.keep(len(prompts))
    _check_losses(config, ledger)
    if config.shuffle_seed is not None:
        random.Random(derive_seed("prompts", config.shuffle_seed)).shuffle(prompts)
    if config.limit is not None and len(prompts) > config.limit:
        ledger.kept = config.limit
        ledger.dropped["over_limit"] = len(prompts) - config.limit
        prompts = prompts[: config.limit]
    context.publication.write_rows("shard-00000.jsonl", prompts, ledger)
    unread = dict(sorted(reader.layout.unread.items(), key=lambda item: (-item[1], item[0])))
    return Outcome("rows", {"assistant_turns_removed": turns_removed, "not_read": unread}, note=not_read(unread))


def not_read(columns: dict[str, int]) -> str:
    """What the stage's last line says of the columns that were not read, with the number of rows that have a value."""
    shown = [f"{name} ({rows})" for name, rows in list(columns.items())[:SHOWN]]
    more = f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
    return f"not read: {', '.join(shown)}{more}" if shown else ""


def _check_losses(config: PromptsConfig, ledger: Ledger) -> None:
    """Stop where too much was lost; what was held out on purpose is no loss."""
    if not ledger.kept:
        raise UserError(f"{config.source} holds no usable prompt: {ledger}.")
    lost = {reason: count for reason, count in ledger.dropped.items() if reason != "held_out"}
    Ledger("rows", ledger.kept + sum(lost.values()), ledger.kept, lost).stop_above(
        config.max_dropped, f"prompts of {config.source}"
    )


class Imported(NamedTuple):
    """What one row is."""

    prompt: Prompt | None
    """None: it is empty."""
    content: str
    """The hash of its conversation."""
    turns_removed: int
    """Trailing assistant turns that were taken away."""


class PromptReader:
    """Reads the rows of one source as prompts, and counts the columns that it does not read."""

    def __init__(self, config: PromptsConfig) -> None:
        self.system = config.system
        self.layout = Layout(config.named_columns())
        self.id_column = self.layout.named.get("id") or "prompt_id"

    def read(self, values: dict[str, Any], place: str) -> "Imported":
        """The prompt of one row.

        Raises:
            UserError: the row has no prompt column, several, or one of the wrong form; names the place.
        """
        row = self.layout.row(values, place)
        column, conversation = row.prompt()
        messages = without_answer(conversation)
        removed = len(conversation) - len(messages)
        if not any(message.content.strip() or message.tool_calls for message in messages):
            self.layout.done(row)
            return Imported(None, "", 0)
        if messages[-1].role == "system":
            raise UserError(
                f"{place}, column {column!r}: the conversation ends with a system message; nobody asks anything."
            )
        choices: dict[str, str] = {}
        if column in TEXTS or "input" in self.layout.named or "choices" in self.layout.named:
            messages, choices = _with_input(row, column, messages)
        messages = self._with_system(row, messages)
        name, described = row.find("tools")
        tools = read_tools(described, f"{place}, column {name!r}") if described else UNSET
        answer, tags = _answer(row, choices), _tags(row)
        name, identity = row.find("id")
        if not isinstance(identity, str | int | None) or isinstance(identity, bool) or identity == "":
            raise UserError(f"{place}: {name} must be a string or a whole number, found {identity!r}.")
        self.layout.done(row)
        try:
            content = prompt_id(messages, tools)
            prompt = Prompt(content if identity is None else str(identity), messages, answer, tags, tools)
            encode(prompt)
        except UnicodeEncodeError as error:
            around = error.object[max(0, error.start - 20) : error.end + 20]
            raise UserError(
                f"{place}: {around!r} holds half of a surrogate pair, which is no text: it was cut in the middle of a "
                "character. Remove it, or the row."
            ) from error
        except ValueError as error:
            raise UserError(f"{place}: a tool or its call holds what JSON cannot say: {error}.") from error
        return Imported(prompt, content, removed)

    def _with_system(self, row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The conversation with the row's system message, or else with the config's."""
        name, text = row.find("system")
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{row.place}: the column {name!r} must be a text, which becomes the system message, found {text!r}. "
                "Set columns={system: null} if it is something else."
            )
        own = messages[0].content if messages[0].role == "system" else None
        if text and own is not None and text.strip() != own.strip():
            raise UserError(
                f"{row.place}: the conversation has a system message, and the column {name!r} another one. Set "
                "columns={system: null} to keep the conversation's."
            )
        text = text or self.system
        return messages if own is not None or text is None else (Message("system", text), *messages)


def _with_input(row: Row, column: str, messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], dict[str, str]]:
    """A question with the text that it is about and with its choices, and those by their letters."""
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


def _choices(row: Row) -> dict[str, str]:
    """The choices of a question by their letters: of a list, an object, or ARC's {text: [...], label: [...]}."""
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


def _answer(row: Row, choices: dict[str, str]) -> str | None:
    """The known answer as a text: what is no text or number as JSON, the index of a choice as its letter."""
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
        raise UserError(f"{row.place}: {name} is {value}, which is no answer. Leave it empty (null), or correct it.")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise UserError(f"{row.place}: {name} cannot be kept as JSON: {error}. Make it a text.") from error


def _plain(value: Any) -> str:
    """Dates and decimal numbers of a table as text."""
    if isinstance(value, bytes):
        raise TypeError("it holds bytes")
    return str(value)


def _tags(row: Row) -> tuple[str, ...]:
    name, tags = row.find("tags")
    tags = [tags] if isinstance(tags, str) else tags or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise UserError(
            f"{row.place}: {name} must be a list of strings, found {tags!r}. Set columns={{tags: null}} to leave it "
            "out."
        )
    return tuple(tags)
