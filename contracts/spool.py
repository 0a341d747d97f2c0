"""Keeps records on the disk until their final order is known."""

import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

from contracts.jsonl import decode_jsonl, encode

R = TypeVar("R")


class Spool:
    """Records in an unnamed temporary file, deleted when the process ends; memory holds 8 bytes per record."""

    def __init__(self, directory: Path) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(dir=directory)  # type: ignore[assignment] # noqa: SIM115 (it is one)
        self._begins = array("Q")
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._begins)

    def add(self, record: Any) -> None:
        """Append a record."""
        self._begins.append(self._end)
        self._end += self._file.write(encode(record))

    def records(self, record_type: type[R]) -> Iterator[R]:
        """Read all records, in the order in which they were added."""
        self._file.seek(0)
        yield from decode_jsonl(Path("spool"), self._file, record_type)

    def write(self, path: Path, order: Iterable[int]) -> None:
        """Write the records at the indices `order`, in that order, to a new JSONL file, and flush it to the disk."""
        with path.open("wb") as target:
            for number in order:
                self._file.seek(self._begins[number])
                target.write(self._file.readline())
            target.flush()
            os.fsync(target.fileno())
