"""Prompts: import of what people have, as a stage of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import msgspec

from contracts.config import StageConfig, identity, input_path
from contracts.fingerprint import digest
from contracts.records import JsonObjects, Message

Column = Literal["prompt", "messages", "context_messages", "question"]


class PromptsConfig(StageConfig):
    """Import prompts from a Hub dataset, a save_to_disk directory, JSONL or Parquet."""

    stage: ClassVar[str] = "prompts"
    code_version: ClassVar[int] = 1

    source: Path = input_path()
    """hf:ORG/NAME[@REVISION], or a path: a save_to_disk directory, a .jsonl or .parquet file or a directory of them."""
    split: str = identity("train")
    """Split of a dataset that has several."""
    column: Column | None = identity(None)
    """Column that holds the prompt; found by itself when only one of these exists."""
    answer_column: str = identity("answer")
    """Column of known answers, for rule scorers; ignored where it does not exist."""
    id_column: str = identity("prompt_id")
    """Column of identities to keep; where it does not exist, the identity is the hash of the conversation."""
    system: str | None = identity(None)
    """System message to put before every conversation that has none."""
    limit: int | None = identity(None, ge=1)
    """Keep only so many prompts."""
    shuffle_seed: int | None = identity(None)
    """Shuffle by this seed (random.Random, seeded by derive_seed) before the limit; None keeps the source's order."""
    duplicates: Literal["error", "drop"] = identity("error")
    """What to do with a prompt that occurs again."""
    exclude: list[Path] = input_path([])
    """Published prompts (held-out sets) that must not occur: they are dropped as held_out, which max_dropped does not
    count."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the rows is dropped."""


def prompt_id(messages: Sequence[Message], tools: JsonObjects | msgspec.UnsetType = msgspec.UNSET) -> str:
    """The identity of a prompt: 16 hex digits of the hash of its conversation, with its tools where it has some."""
    turns = [msgspec.to_builtins(message) for message in messages]
    return digest(turns if tools is msgspec.UNSET else {"messages": turns, "tools": tools})[:16]
