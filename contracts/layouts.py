"""Finds the columns of a data set that hold the prompt, the answer and so on, by their usual names or by the config.

A column may be nested in another one ("reward_model.ground_truth"). Columns that are not read are counted.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from contracts.conversations import read_messages
from contracts.errors import UserError, did_you_mean
from contracts.records import Message

Slot = Literal["prompt", "system", "input", "choices", "answer", "id", "tags", "tools"]
Field = Slot | Literal["response"]
"""A slot that a column can fill; only demonstrations read the response."""

CONVERSATIONS = ("messages", "context_messages", "conversations", "conversation")
"""Names of columns that hold a conversation; if there is also a column of TEXTS, that repeats a part of it."""
TEXTS = ("prompt", "question", "instruction", "problem", "query")
NAMES: dict[Field, tuple[str, ...]] = {
    "prompt": (*CONVERSATIONS, *TEXTS, "chosen"),
    "system": ("system", "system_prompt", "system_message"),
    "input": ("input", "context", "passage", "article"),
    "choices": ("choices", "options"),
    "answer": ("answer", "answerKey", "reward_model.ground_truth", "expected_answer", "ground_truth", "answers"),
    "id": ("prompt_id",),
    "tags": ("tags",),
    "tools": ("tools", "functions"),
    "response": ("output", "response", "completion"),
}
"""The column names that are recognized for each slot; the first one with a value is read. `input` is read with a prompt
in one of TEXTS other than `prompt`, and `choices` with a prompt in any of TEXTS; `chosen` (next to `rejected`) is a
conversation whose last answer is removed."""

Columns = Mapping[Field, str | None]
SHOWN = 8


class SourceRow:
    """One row of a data set, which keeps track of the columns that were read."""

    def __init__(self, layout: "Layout", values: dict[str, Any], place: str) -> None:
        self.layout = layout
        self.values = values
        self.place = place
        self.unread: set[str] = set()
        self._read: set[str] = set()
        self._candidates = layout.candidates(values)

    def find(self, slot: Field) -> tuple[str, Any]:
        """Find the column of a slot, mark it as read, and return its name and value; ("", None) if there is none."""
        for name in self._candidates[slot]:
            if (value := look_up(self.values, name)) is not None:
                return self.read(name), value
        return "", None

    def read(self, name: str) -> str:
        """Mark a column as read."""
        self._read.add(name)
        return name

    def forget(self, name: str) -> None:
        """Mark a column as not read after all, because it holds something else than expected."""
        self._read.discard(name)

    def prompt(self) -> tuple[str, tuple[Message, ...]]:
        """Find the column of the prompt, and read its conversation.

        Raises:
            UserError: there is none, there are several, or the value is not a conversation.
        """
        name = self.layout.named.get("prompt") or self._find_prompt()
        value = look_up(self.values, name)
        if value is None and not has_column(self.values, name):
            raise UserError(
                f"{self.place}: no column {name!r}; found {', '.join(self.values)}."
                f"{did_you_mean(name, self.values, 2)} Set column."
            )
        self.read(name)
        messages = read_messages(value, self.place, name, self.unread)
        if name == "chosen" and self.values.get("rejected") is not None:
            other = read_messages(self.values[self.read("rejected")], self.place, "rejected", self.unread)
            if without_answer(messages) != without_answer(other):
                raise UserError(
                    f"{self.place}: chosen and rejected answer different prompts, and there is no column of the prompt."
                )
        texts = [text for text in TEXTS if isinstance(self.values.get(text), str)] if name in CONVERSATIONS else []
        if texts:
            contents = {message.content.strip() for message in messages}
            self._read.update(text for text in texts if self.values[text].strip() in contents)
        return name, messages

    def _find_prompt(self) -> str:
        found = [name for name in self._candidates["prompt"] if self.values[name] is not None]
        if "chosen" in found and (len(found) > 1 or isinstance(self.values["chosen"], str)):
            # Next to a prompt it is the answer; alone, a text without turns does not contain the prompt.
            messages = read_messages(self.values["chosen"], self.place, "chosen", set()) if len(found) == 1 else ()
            if len(messages) < 2:
                found.remove("chosen")
        if len(found) == 1:
            return found[0]
        if found and found[0] in CONVERSATIONS and isinstance(self.values[found[0]], list):
            # Chat data sets have the text of the prompt in a column next to the conversation that it begins.
            others = [name for name in found[1:] if not isinstance(self.values[name], str)]
            if not others and (found[1:] == ["prompt"] or self._contains(found[0], found[1:])):
                return found[0]
        if found:
            raise UserError(f"{self.place}: several columns could be the prompt: {', '.join(found)}. Set column.")
        if there := [name for name in self._candidates["prompt"] if name in self.values]:
            what = "holds no prompt" if self.values[there[0]] is not None else "is null"
            raise UserError(f"{self.place}: the column {there[0]!r} {what}. Remove the row, or set column to another.")
        raise UserError(
            f"{self.place}: no column {', '.join(NAMES['prompt'])}; found {', '.join(self.values) or 'none'}. Set "
            "column to the one that holds the prompt."
        )

    def _contains(self, conversation: str, texts: list[str]) -> bool:
        messages = read_messages(self.values[conversation], self.place, conversation, set())
        contents = {message.content.strip() for message in messages}
        return all(self.values[name].strip() in contents for name in texts)

    def close(self) -> set[str]:
        """Return the names of the columns that have a value and were not read."""
        tops = {name.partition(".")[0] for name in self._read if name not in self.values}
        for name, value in self.values.items():
            if value is None or name in self._read:
                continue
            if name in tops and isinstance(value, dict):
                inner = {f"{name}.{key}" for key, held in value.items() if held is not None}
                self.unread |= inner - self._read
            else:
                self.unread.add(name)
        return self.unread


class Layout:
    """The columns of one data set: those named in the config, those found, and counts of those not read."""

    def __init__(self, named: Columns) -> None:
        self.named = named
        self.rows = 0
        self.unread: Counter[str] = Counter()
        self._missing = {slot: name for slot, name in named.items() if name is not None}
        self._seen: dict[str, None] = {}
        self._candidates: dict[tuple[str, ...], dict[Field, tuple[str, ...]]] = {}

    def row(self, values: dict[str, Any], place: str) -> SourceRow:
        """Begin to read a row of the data set."""
        self.rows += 1
        if self._missing:
            self._note(values)
        return SourceRow(self, values, place)

    def done(self, row: SourceRow) -> None:
        """Finish a row: count the columns that were not read."""
        self.unread.update(row.close())

    @property
    def not_read(self) -> dict[str, int]:
        """The columns that were not read, with the number of rows that have a value there."""
        return dict(sorted(self.unread.items(), key=lambda item: (-item[1], item[0])))

    @property
    def note(self) -> str:
        """The columns that were not read as text, for a stage's last line of output."""
        columns = self.not_read
        shown = [f"{name} ({rows})" for name, rows in list(columns.items())[:SHOWN]]
        more = f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
        return f"not read: {', '.join(shown)}{more}" if shown else ""

    def candidates(self, values: dict[str, Any]) -> dict[Field, tuple[str, ...]]:
        """The columns of a row that may fill each slot, in order of preference."""
        columns = tuple(values)
        if columns not in self._candidates:
            if len(self._candidates) > 1000:  # the columns differ from row to row
                self._candidates.clear()
            self._candidates[columns] = {slot: self._names(slot, values) for slot in NAMES}
        return self._candidates[columns]

    def _names(self, slot: Field, values: dict[str, Any]) -> tuple[str, ...]:
        if slot not in self.named:
            return tuple(name for name in NAMES[slot] if name in values or name.partition(".")[0] in values)
        name = self.named[slot]
        return () if name is None else (name,)

    def require_named(self, source: str) -> None:
        """Raise UserError if the config names a column in which no row has a value."""
        for slot, name in self._missing.items():
            if self.rows:
                raise UserError(
                    f"{source}: none of its {self.rows} rows has a value in the column {name!r}, which is named as the "
                    f"{slot}; found {', '.join(self._seen)}.{did_you_mean(name, self._seen, 2)}"
                )

    def _note(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._seen.setdefault(name)
            if isinstance(value, dict):
                self._seen.update(dict.fromkeys(f"{name}.{key}" for key in value))
        for slot, name in list(self._missing.items()):
            if look_up(values, name) is not None:
                del self._missing[slot]


def look_up(values: dict[str, Any], name: str) -> Any:
    """The value of a column, or of a key inside one ("reward_model.ground_truth"); None if there is none."""
    if name in values or "." not in name:
        return values.get(name)
    value: Any = values
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def has_column(values: dict[str, Any], name: str) -> bool:
    """Whether a column or nested key exists, even without a value."""
    parent, _, key = name.rpartition(".")
    above = look_up(values, parent) if parent else None
    return name in values or (isinstance(above, dict) and key in above)


def without_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Remove the assistant's turns at the end of a conversation."""
    kept = len(messages)
    while kept and messages[kept - 1].role == "assistant":
        kept -= 1
    return messages[:kept]
