"""What goes into a chat template must come out: whether the text of every turn occurs in the rendering.

Templates leave turns out without an error: of roles that they have no branch for, of content that is no list of parts,
of tools. Two ways of a template are not losses: white space at the ends of a turn, and what an assistant thought
(`<think>...</think>`, `reasoning_content`) before an answer, which templates of reasoning models leave out on purpose.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from contracts.records import JsonObjects, Message

THINK_END = "</think>"


def with_marks(messages: Sequence[Message]) -> list[Message]:
    """The turns with a word of its own in the place of each text that is not empty."""
    return [
        msgspec.structs.replace(message, content=mark(place) if message.content.strip() else message.content)
        for place, message in enumerate(messages)
    ]


def mark(place: int) -> str:
    """A word that no template has, for the turn at `place`."""
    return f"qzturn{place}xk"


def missing_marks(messages: Sequence[Message], rendered: str) -> list[int]:
    """Places of turns of `with_marks` that are not in the rendering."""
    return [place for place, message in enumerate(messages) if message.content.strip() and mark(place) not in rendered]


def shows_python(rendered: str) -> bool:
    """Whether a template has written a list of parts as such, instead of the text in it."""
    return "{'type'" in rendered or '{"type": "text"' in rendered


def lost(messages: Sequence[Message], rendered: str) -> int | None:
    """The place of the first turn whose text does not occur in what was rendered; None where there is none."""
    for place, message in enumerate(messages):
        if not occurs(message.content, rendered, thinks=message.role == "assistant"):
            return place
    return None


def lost_call(messages: Sequence[Message], rendered: str) -> str | None:
    """What a rendering lacks of the turns' tool calls: the name of a function, or the text of an argument."""
    for message in messages:
        if message.tool_calls is msgspec.UNSET:
            continue
        for call in message.tool_calls:
            for text in texts_in(call.get("function", call)):
                if not occurs(text, rendered, thinks=False):
                    return text
    return None


def lost_tool(tools: JsonObjects, rendered: str) -> str | None:
    """The name of a tool that a rendering lacks."""
    for tool in tools:
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in rendered:
            return name
    return None


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a tool call, or in what has tool calls in it: names, and what is in the arguments, which may be
    JSON in a text."""
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
    """Whether a text is in a rendering; `thinks`: what is before its last `</think>` may be missing."""
    if text in rendered or text.strip() in rendered:
        return True
    forms = [text]
    if thinks and THINK_END in text:
        forms.append(text.rpartition(THINK_END)[2])
    bare = _bare(rendered)
    # Llama 3.1 and gpt-oss write what a tool said as JSON.
    return any(
        _bare(form) in bare or any(_bare(json.dumps(form, ensure_ascii=ascii)[1:-1]) in bare for ascii in (False, True))
        for form in forms
    )


def _bare(text: str) -> str:
    return "".join(text.split())
