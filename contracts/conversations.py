"""Reads conversations of various formats as messages: OpenAI's and ShareGPT's turns, Anthropic's transcripts, content
in parts, tools and tool calls.

Data that cannot be read is an error that names its place; fields that are not read are counted.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from contracts.errors import UserError
from contracts.records import JsonObjects, Message

ROLES = {
    "system": ("developer",),
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "bot", "bing", "bard", "model"),
    "tool": ("function", "function_response", "observation"),
}
"""The roles of messages, each with its names in other formats (`developer` is OpenAI's new name for system)."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys for an assistant's reasoning, which is stored as `reasoning_content`."""
TEXT_PARTS = ("text", "input_text", "output_text")

_ROLES = {name: role for role, others in ROLES.items() for name in (role, *others)}
_READ = {"role", "from", "content", "value", *THOUGHTS, "tool_calls", "function_call", "tool_call_id", "name"}
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


def read_messages(value: Any, place: str, column: str, unread: set[str]) -> tuple[Message, ...]:
    """Read the messages of one column: a text, which becomes the user's turn, a transcript, or a list of turns.

    Args:
        value: the column's value; a list may also be given as its JSON text.
        place: the file and row, for messages.
        column: the column's name.
        unread: receives the names of the turns' fields that are not read ("messages.weight").

    Raises:
        UserError: it is not a conversation, or has content other than text; the message names the place.
    """
    where = f"{place}, column {column!r}"
    if isinstance(value, str):
        turns = _written_turns(value, where)
        if turns is None:
            return read_transcript(value) or (Message("user", value),)
        value = turns
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: expected a text or a list of {{role, content}} messages, found {_short(value)}.")
    messages = []
    for number, turn in enumerate(value, 1):
        plain = isinstance(turn, dict) and len(turn) == 2 and isinstance(turn.get("role"), str)
        role, content = (turn.get("role"), turn.get("content")) if plain else (None, None)
        if role in ROLES and isinstance(content, str):
            messages.append(Message(role, content))
        else:
            messages.append(_message(turn, f"{where}, turn {number}", column, unread))
    return tuple(messages)


def read_transcript(text: str) -> tuple[Message, ...]:
    """Read a transcript as in Anthropic's HH-RLHF ("\\n\\nHuman: ...\\n\\nAssistant: ..."); empty for any other text.

    An empty last turn of the assistant, which only says who is next, is left out.
    """
    if not text.startswith("\n\nHuman:") or "\n\nAssistant:" not in text:
        return ()
    _, *pieces = _TRANSCRIPT.split(text)
    turns = [
        Message("user" if speaker == "Human" else "assistant", words.strip())
        for speaker, words in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return tuple(turns[:-1] if turns[-1] == Message("assistant", "") else turns)


def with_answer(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """Append an answer to a conversation; if the conversation ends with a prefill, extend that turn."""
    *before, last = messages
    if last.role != "assistant":
        return (*messages, Message("assistant", text))
    return (*before, msgspec.structs.replace(last, content=last.content + text))


def split_prefill(messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
    """Split a conversation into the turns before its prefill and the prefill's text, "" if it has none."""
    has_prefill = bool(messages) and messages[-1].role == "assistant"
    return (messages[:-1], messages[-1].content) if has_prefill else (messages, "")


def read_tools(value: Any, place: str) -> JsonObjects | UnsetType:
    """Read the tools that an assistant may call from a list of descriptions or its JSON text.

    Keys with the value null are left out, because tables add them for keys that only other rows have.

    Raises:
        UserError: it is not a list of objects with names; the message names the place.
    """
    return tuple(_functions(value, place, "tool")) or UNSET


def read_calls(value: Any, place: str) -> JsonObjects | UnsetType:
    """Read the tool calls of an assistant's turn; arguments that are given as JSON text are parsed.

    Raises:
        UserError: it is not a list of objects with names, or arguments are not a JSON object; the message names the
            place.
    """
    calls = list(_functions(value, place, "tool call"))
    for number, call in enumerate(calls):
        given = call["function"].get("arguments")
        arguments = _parsed(given, f"{place}, the arguments of {call['function']['name']}") if given else {}
        if not isinstance(arguments, dict):
            raise UserError(f"{place}: the arguments of a tool call must be a JSON object, found {_short(given)}.")
        calls[number] = {**call, "function": {**call["function"], "arguments": arguments}}
    return tuple(calls) or UNSET


def _message(turn: Any, place: str, column: str, unread: set[str]) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{place}: expected a {{role, content}} message, found {_short(turn)}.")
    called = turn.get("role") or turn.get("from")
    calls = turn.get("tool_calls") or (turn.get("function_call") and [turn["function_call"]])
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    if called == "function_call":  # ShareGPT's, with the call as the turn's text
        called, calls, content = "assistant", [_parsed(content, place)], None
    role = _ROLES.get(called) if isinstance(called, str) else None
    if role is None:
        raise UserError(f"{place}: the role {called!r} is none of {', '.join(_ROLES)}.")
    if content is None and not (calls and role == "assistant"):
        raise UserError(f"{place}: the message has no content; only an assistant's with tool_calls may have none.")
    thoughts = next((turn[name] for name in THOUGHTS if turn.get(name)), UNSET)
    further = {"reasoning_content": thoughts, **{name: turn.get(name) or UNSET for name in ("tool_call_id", "name")}}
    if wrong := [name for name, text in further.items() if not isinstance(text, str | UnsetType)]:
        raise UserError(f"{place}: {wrong[0]} must be a text, found {_short(further[wrong[0]])}.")
    unread.update(f"{column}.{name}" for name, held in turn.items() if name not in _READ and held is not None)
    return Message(
        role,  # type: ignore[arg-type]
        "" if content is None else _text(content, place),
        tool_calls=read_calls(calls, place) if calls else UNSET,
        **further,
    )


def _written_turns(text: str, place: str) -> list[Any] | None:
    """Parse a text that is a conversation as JSON, as in tables; None if it is any other text.

    Raises:
        UserError: it is the Python repr of a conversation, as pandas writes it into CSV.
    """
    if not (_WRITTEN.match(text) and text.rstrip().endswith("]")):
        return None
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place}: a conversation as text that is not valid JSON, found {_short(text)} ({error}). Write the "
            "column with json.dumps, or the data as JSON Lines or Parquet."
        ) from error
    return turns if isinstance(turns, list) else None


def _text(content: Any, place: str) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{place}: content must be a text, found {_short(content)}.")
    return "".join(_part(part, place) for part in content)


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    part_type = part.get("type") if isinstance(part, dict) else None
    raise UserError(
        f"{place}: a part of the content is not text ({f'its type is {part_type!r}' if part_type else _short(part)}); "
        "only text can be read. Remove the rows with such parts."
    )


def _functions(value: Any, place: str, what: str) -> Iterator[dict[str, Any]]:
    """Yield descriptions or calls in OpenAI's format, {type: function, function: {name, ...}}; the inner object alone
    is accepted too."""
    value = _parsed(value, f"{place}, {what}s")
    for item in value if isinstance(value, list | tuple) else [value]:
        item = _parsed(item, f"{place}, {what}s")
        if isinstance(item, dict) and isinstance(item.get("function"), dict):
            outer, inner = item, item["function"]
        else:
            outer, inner = {"type": "function"}, item
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise UserError(f"{place}: a {what} must be an object with the name of a function, found {_short(item)}.")
        yield _without_nulls({**outer, "function": inner})


def _parsed(value: Any, place: str) -> Any:
    """Parse a JSON text; return any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: expected JSON, found {_short(value)} ({error}).") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
