"""Writes pairs as a Hugging Face dataset: one Parquet file with the same rows and columns as the JSONL.

In a table every row has the same columns, and every object the same keys. So optional fields (tools, tags, and fields
of turns other than role and content) get a column only if they occur, and objects are stored as JSON text.
"""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.records import Message, Pair, Rollout

ROWS_PER_GROUP = 10_000
IDS = pa.list_(pa.int32())
_COLUMNS = {
    "pair_id": pa.string(),
    "prompt_id": pa.string(),
    "prompt": pa.string(),
    "prompt_ids": IDS,
    "chosen_ids": IDS,
    "rejected_ids": IDS,
    "chosen": pa.string(),
    "rejected": pa.string(),
    "chosen_sample": pa.int32(),
    "rejected_sample": pa.int32(),
    "chosen_finish_reason": pa.string(),
    "rejected_finish_reason": pa.string(),
    "chosen_score": pa.float64(),
    "rejected_score": pa.float64(),
    "margin": pa.float64(),
    "strategy": pa.string(),
    "iteration": pa.int32(),
}
OPTIONAL_FIELDS = tuple(field.name for field in msgspec.structs.fields(Message) if not field.required)
TOOLS, TAGS = "tools", "tags"


def schema_of(optional: Collection[str]) -> pa.Schema:
    """The columns for pairs with the optional fields `optional`: fields of messages, the tools, or the tags."""
    tools = {TOOLS: pa.string()} if TOOLS in optional else {}
    tags = {TAGS: pa.list_(pa.string())} if TAGS in optional else {}
    return pa.schema({**_COLUMNS, "messages": pa.list_(turn_type(optional)), **tools, **tags})


def turn_type(optional: Collection[str]) -> pa.StructType:
    """The type of one turn of a conversation."""
    return pa.struct(
        {name: pa.string() for name in ("role", "content", *(name for name in OPTIONAL_FIELDS if name in optional))}
    )


def optional_fields_of(rollout: Rollout) -> set[str]:
    """The optional fields that a rollout's conversation has: fields of turns, the tools and the tags."""
    found = {name for turn in rollout.messages for name in OPTIONAL_FIELDS if getattr(turn, name) is not msgspec.UNSET}
    return found | ({TOOLS} if rollout.tools is not msgspec.UNSET else set()) | ({TAGS} if rollout.tags else set())


class PairsParquet:
    """Writes pairs in row groups of a fixed size, so that the same pairs give the same bytes."""

    def __init__(self, path: Path, optional: Collection[str] = ()) -> None:
        self._schema = schema_of(optional)
        self._writer: Any = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, pairs: Iterable[Pair]) -> None:
        """Append pairs."""
        for pair in pairs:
            self._rows.append(flat_row(msgspec.to_builtins(pair)))
            if len(self._rows) == ROWS_PER_GROUP:
                self._flush(ROWS_PER_GROUP)

    def _flush(self, count: int) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows[:count], schema=self._schema))
        del self._rows[:count]

    def __enter__(self) -> "PairsParquet":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the last rows and close the file; its footer comes last."""
        if kind is None and self._rows:
            self._flush(len(self._rows))
        self._writer.close()


def flat_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of pairs or rollouts with its lists of objects (tools and tool calls) encoded as JSON text."""
    for holder, name in ((row, TOOLS), *((turn, "tool_calls") for turn in row["messages"])):
        if name in holder:
            holder[name] = json.dumps(holder[name], ensure_ascii=False)
    return row
