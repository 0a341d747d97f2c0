"""Pairs as a Hugging Face dataset: one Parquet file with the same rows and columns as the JSONL."""

from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.records import Pair

ROWS_PER_GROUP = 10_000
_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "pair_id": pa.string(),
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        "prompt_ids": _IDS,
        "chosen_ids": _IDS,
        "rejected_ids": _IDS,
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
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    }
)


class PairsParquet:
    """Writes pairs in row groups of a fixed size, so that the same pairs give the same bytes."""

    def __init__(self, path: Path) -> None:
        self._writer: Any = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, pairs: list[Pair]) -> None:
        """Append pairs."""
        self._rows += [msgspec.to_builtins(pair) for pair in pairs]
        while len(self._rows) >= ROWS_PER_GROUP:
            self._flush(ROWS_PER_GROUP)

    def _flush(self, count: int) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows[:count], schema=SCHEMA))
        del self._rows[:count]

    def __enter__(self) -> "PairsParquet":
        """Begin writing."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the last rows and close the file; its footer comes last."""
        if kind is None and self._rows:
            self._flush(len(self._rows))
        self._writer.close()
