"""Reads wandb's run files, which hold protobuf records in blocks of 32 KiB like LevelDB's logs, and wandb's own log."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

MAGIC = b":W&B"
FILE_HEADER = 7
BLOCK = 1 << 15
RECORD_HEADER = struct.Struct("<IHB")  # checksum, length, type
FULL, FIRST, MIDDLE, LAST = range(1, 5)
FATAL = "ERROR+4"
"""The level of log messages of wandb's own process after which it sends nothing more."""
ERROR = "ERROR"
"""The level of messages about single failures, such as a record that could not be written."""


def steps_in(folder: Path, run_id: str) -> set[int]:
    """The steps of a run in the files of all processes that logged to it."""
    return {step for file in sorted(folder.glob(f"*run-*/run-{run_id}.wandb")) for step, _ in history(file)}


def history(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each logged step with its values, without a last record that a killed process left incomplete.

    Raises:
        ValueError: the file is not wandb's.
    """
    for content in _records(file.read_bytes(), file):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            values = {
                (item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
            }
            yield int(values.get("_step", record.history.step.num)), values


def first_error(log: Path, level: str) -> str | None:
    """The first message of a level in the log of wandb's own process (`settings.log_internal`); None if there is none.

    Raises:
        FileNotFoundError: there is no log.
    """
    lines = log.read_bytes().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last one may be incomplete
    return next((str(entry["msg"]) for entry in entries if entry["level"] == level), None)


def _records(content: bytes, file: Path) -> Iterator[bytes]:
    if not content:
        return  # its process was killed before it wrote anything
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{file} is no file of wandb")
    offset, parts = FILE_HEADER, b""
    while offset + RECORD_HEADER.size <= len(content):
        if BLOCK - offset % BLOCK < RECORD_HEADER.size:
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = RECORD_HEADER.unpack_from(content, offset)
        begin, offset = offset + RECORD_HEADER.size, offset + RECORD_HEADER.size + length
        if offset > len(content) or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        parts = content[begin:offset] if kind in (FULL, FIRST) else parts + content[begin:offset]
        if kind in (FULL, LAST):
            yield parts
