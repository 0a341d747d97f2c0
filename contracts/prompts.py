"""The configuration of the prompts stage, which imports a prompt set, and the ids of prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import msgspec
from pydantic import model_validator

from contracts.config import Section, StageConfig, identity, input_path
from contracts.fingerprint import digest
from contracts.layouts import Columns, Slot
from contracts.records import JsonObjects, Message

SHORT: dict[str, Slot] = {"column": "prompt", "answer_column": "answer", "id_column": "id"}
"""Config keys that name one column each, with the slot that it fills."""


class PromptsSettings(Section):
    """Settings of a prompt set: its source and which prompts to take."""

    source: Path = input_path()
    """hf:ORG/NAME[:CONFIG][@REVISION], or a path: a save_to_disk directory, a .jsonl, .json, .csv, .tsv or .parquet
    file (all but the last also as .gz, .bz2, .xz or .zst), a directory of them, or a pattern (data/part-*.jsonl)."""
    split: str = identity("train")
    """Split of a data set that has several; files of a directory state theirs in their names."""
    column: str | None = identity(None)
    """Column with the prompt; found automatically under one of the usual names (docs/stages.md)."""
    answer_column: str | None = identity(None)
    """Column of known answers, for rule scorers; found automatically like the prompt's."""
    answer_after: str | None = identity(None, later=True, min_length=1)
    """Keep of each answer what follows the last occurrence of this text, stripped: "####" in GSM8K."""
    id_column: str | None = identity(None)
    """Column of ids to keep, by default prompt_id; without one, the id is the hash of the conversation."""
    columns: dict[Slot, str | None] = identity({}, later=True)
    """Columns of any of prompt, system, input, choices, answer, id, tags and tools, by name; `a.b` is the key b in the
    column a, and null reads none. For example {prompt: text, system: persona}."""
    system: str | None = identity(None)
    """System message to prepend to every conversation that has none."""
    prefill: bool = identity(False, later=True)
    """Keep an assistant turn at the end of a conversation as the beginning of the response, which the policy continues;
    otherwise the turn is removed."""
    limit: int | None = identity(None, ge=1)
    """Keep only this many prompts."""
    shuffle_seed: int | None = identity(None)
    """Shuffle with this seed (random.Random, seeded by derive_seed) before the limit; None keeps the source's order."""
    duplicates: Literal["error", "drop"] = identity("error")
    """What to do with a duplicate prompt."""
    near_duplicates: float | None = identity(None, gt=0, le=1, later=True)
    """Drop prompts whose similarity to an earlier one, or in a run to a held-out one, is at least this: the Jaccard
    similarity of word triples, for example 0.7. They are counted, but not under max_dropped."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the rows is dropped."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        for key, slot in SHORT.items():
            if getattr(self, key) is not None and slot in self.columns:
                raise ValueError(f"{key} and columns.{slot} name the same column; set one of them")
        return self

    def named_columns(self) -> Columns:
        """The columns that the config names, by slot."""
        short = [(slot, name) for key, slot in SHORT.items() if (name := getattr(self, key))]
        return dict([*short, *self.columns.items()])


class PromptsConfig(PromptsSettings, StageConfig):
    """Import prompts from a Hub dataset, a save_to_disk directory, JSONL, JSON, CSV or Parquet."""

    stage: ClassVar[str] = "prompts"
    code_version: ClassVar[int] = 2

    exclude: list[Path] = input_path([])
    """Published prompts (held-out sets) that must not occur: they are dropped as held_out, which max_dropped does not
    count."""


EMPTY_PROMPT = "empty_prompt"
"""Reason in the drop ledger for responses to an empty prompt."""


def is_empty(messages: Sequence[Message]) -> bool:
    """Whether a conversation is empty apart from system messages."""
    return not any(turn.content.strip() or turn.tool_calls for turn in messages if turn.role != "system")


def prompt_id(messages: Sequence[Message], tools: JsonObjects | msgspec.UnsetType = msgspec.UNSET) -> str:
    """The id of a prompt: 16 hex digits of the hash of its conversation and, if it has any, its tools."""
    turns = [msgspec.to_builtins(message) for message in messages]
    return digest(turns if tools is msgspec.UNSET else {"messages": turns, "tools": tools})[:16]
