"""Checks that a rendered conversation contains the text of every turn that was given to the chat template.

Templates drop turns without an error: turns of roles that they have no branch for, content that is not a list of parts,
tools. Two differences do not count as losses: whitespace at the ends of a turn, and an assistant's thoughts before an
answer (`<think>...</think>`, `reasoning_content`), which templates of reasoning models drop on purpose.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from contracts.records import JsonObjects, Message

THINK_END = "</think>"


def with_markers(messages: Sequence[Message]) -> list[Message]:
    """Replace each turn's text, unless it is empty, by a unique marker."""
    return [
        msgspec.structs.replace(message, content=marker(place) if message.content.strip() else message.content)
        for place, message in enumerate(messages)
    ]


def marker(place: int) -> str:
    """The marker of the turn at index `place`: a word that occurs in no template."""
    return f"qzturn{place}xk"


def missing_markers(messages: Sequence[Message], rendered: str) -> list[int]:
    """Indices of the turns of `with_markers` whose markers are missing in the rendering."""
    return [
        place for place, message in enumerate(messages) if message.content.strip() and marker(place) not in rendered
    ]


def shows_parts(rendered: str) -> bool:
    """Whether a template has printed a list of parts as a Python or JSON object instead of its text."""
    return "{'type'" in rendered or '{"type": "text"' in rendered


def missing_turn(messages: Sequence[Message], rendered: str) -> int | None:
    """Index of the first turn whose text is missing in the rendering; None if none is."""
    for place, message in enumerate(messages):
        if not occurs(message.content, rendered, thinks=message.role == "assistant"):
            return place
    return None


def missing_call(messages: Sequence[Message], rendered: str) -> str | None:
    """The first part of the turns' tool calls (a function's name or an argument's text) that the rendering lacks."""
    for message in messages:
        if message.tool_calls is msgspec.UNSET:
            continue
        for call in message.tool_calls:
            for text in texts_in(call.get("function", call)):
                if not occurs(text, rendered, thinks=False):
                    return text
    return None


def missing_tool(tools: JsonObjects, rendered: str) -> str | None:
    """The name of the first tool that the rendering lacks."""
    for tool in tools:
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in rendered:
            return name
    return None


def texts_in(value: Any) -> Iterator[str]:
    """Yield all strings in a value that is or contains tool calls: names and arguments, which may be JSON strings."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "arguments" and isinstance(item, str):
                with contextlib.suppress(ValueError):
                    item = json.loads(item)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value


def occurs(text: str, rendered: str, *, thinks: bool = False) -> bool:
    """Whether a text occurs in a rendering; `thinks`: the part up to its last `</think>` may be missing."""
    if text in rendered or text.strip() in rendered:
        return True
    forms = [text]
    if thinks and THINK_END in text:
        forms.append(text.rpartition(THINK_END)[2])
    bare = _bare(rendered)
    # Llama 3.1 and gpt-oss write the output of a tool as JSON.
    return any(
        _bare(form) in bare or any(_bare(json.dumps(form, ensure_ascii=ascii)[1:-1]) in bare for ascii in (False, True))
        for form in forms
    )


def _bare(text: str) -> str:
    return "".join(text.split())
