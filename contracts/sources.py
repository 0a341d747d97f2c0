"""Rows from what people have: a Hub dataset, a save_to_disk directory, JSONL, Parquet, a published artifact."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts.artifacts import MANIFEST, Artifact
from contracts.errors import UserError
from contracts.jsonl import open_stored

Row = tuple[str, dict[str, Any]]
"""Where the row stands, for messages ("file.jsonl, line 3"), and its columns."""


def read_rows(source: str, split: str) -> Iterator[Row]:
    """All rows of a source, in its order.

    Raises:
        UserError: there is nothing to read, or a file is damaged; names the file and the line.
    """
    if source.startswith("hf:"):
        yield from _hub(source.removeprefix("hf:"), split)
        return
    path = Path(source)
    if path.is_file():
        yield from _file(path)
    elif (path / MANIFEST).is_file():
        for shard in Artifact.open(path).shards:
            yield from _json_lines(shard)
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _saved_dataset(path, split)
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS)
        if not files:
            raise UserError(f"prompts source {path} holds no file that ends with {', '.join(READERS)}.")
        for file in files:
            yield from _file(file)
    else:
        raise UserError(f"prompts source {path} does not exist. Give a file, a directory, or hf:ORG/NAME.")


def _file(path: Path) -> Iterator[Row]:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"prompts source {path} ends with {path.suffix!r}; expected one of {', '.join(READERS)}.")
    yield from reader(path)


def _json_lines(path: Path) -> Iterator[Row]:
    with open_stored(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: not valid JSON ({error}). Each line must be one JSON object.") from error
            if not isinstance(row, dict):
                raise UserError(f"{place}: a {type(row).__name__}, but each line must be one JSON object.")
            yield place, row


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}.") from error
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


READERS = {".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet}


def _saved_dataset(path: Path, split: str) -> Iterator[Row]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"{path} has no split {split!r}, only {', '.join(loaded)}. Set split.")
        loaded = loaded[split]
    for number, row in enumerate(loaded, 1):
        yield f"{path}, row {number}", row


def _hub(name: str, split: str) -> Iterator[Row]:
    import datasets

    dataset, _, revision = name.partition("@")
    try:
        loaded = datasets.load_dataset(dataset, split=split, revision=revision or None)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise UserError(
            f"dataset hf:{name} (split {split!r}) could not be loaded: {str(error).splitlines()[0]} "
            "Check the name, the split and the network; HF_TOKEN for gated datasets."
        ) from error
    for number, row in enumerate(loaded, 1):
        yield f"hf:{name}, row {number}", row
