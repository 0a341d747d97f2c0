"""Reads and writes JSONL files: one typed record per line, streamed, with strict validation."""

import contextlib
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from contracts.errors import UserError

R = TypeVar("R")
COMPRESSED = ".gz"
"""Suffix that is appended to the name of a compressed file."""

_encoder = msgspec.json.Encoder()


def encode(record: Any) -> bytes:
    """Encode one record as a line of UTF-8 JSON with its newline; floats round-trip exactly."""
    return _encoder.encode(record) + b"\n"


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """Write `records` to a new file, flush it to the disk and return how many there were."""
    rows = 0
    with path.open("wb") as file:
        for record in records:
            file.write(encode(record))
            rows += 1
        file.flush()
        os.fsync(file.fileno())
    return rows


def open_stored(path: Path) -> BinaryIO:
    """Open a file that is stored as PATH, or compressed as PATH.gz."""
    compressed = path.with_name(path.name + COMPRESSED)
    if compressed.is_file() and not path.exists():
        return gzip.open(compressed)  # type: ignore[return-value]
    return path.open("rb")


@contextlib.contextmanager
def _damage_as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}{COMPRESSED} is cut off or damaged: {error}. Delete it and recompute it.") from error


def read_jsonl(path: Path, record_type: type[R], *, tolerate_torn_tail: bool = False) -> Iterator[R]:
    """Read records of type `record_type` one by one, from PATH.gz if PATH does not exist.

    `tolerate_torn_tail`: ignore a last line without a newline, as a killed writer leaves it; use it only on append-only
    logs, never on published files, where such a line is damage.

    Raises:
        UserError: a line is not a valid record; the message names the file, the line and the problem.
    """
    with open_stored(path) as file, _damage_as_user_error(path):
        yield from decode_jsonl(path, file, record_type, tolerate_torn_tail=tolerate_torn_tail)


def decode_jsonl(
    path: Path, lines: Iterable[bytes], record_type: type[R], *, tolerate_torn_tail: bool = False
) -> Iterator[R]:
    """Decode records, as `read_jsonl` does, from lines in memory; `path` names their file in messages."""
    decoder = msgspec.json.Decoder(record_type)
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n") and tolerate_torn_tail:
            return
        if not line.strip():
            continue
        try:
            yield decoder.decode(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: {error}. Each line must be one JSON object"
                + (f" with the fields of {record_type.__name__}." if record_type is not dict else ".")
            ) from error
