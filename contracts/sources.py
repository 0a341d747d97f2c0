"""Reads rows from a Hub data set, a save_to_disk directory, files, directories of files, or an artifact."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.files import matches
from contracts.formats import AGAIN, DAMAGED, Row, first_line, read_file
from contracts.manifest import MANIFEST
from contracts.splits import choose_files, require_split_of_file

HUB = "hf:"
INFO, STATE, SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"


def read_rows(source: str, split: str) -> Iterator[Row]:
    """Yield all rows of one split of a source, in its order.

    Raises:
        UserError: there is nothing to read, the split does not exist, or a file is damaged; the message names the file
            and the row.
    """
    if source.startswith(HUB):
        yield from _hub(source, split)
        return
    path = Path(source)
    if path.is_file():
        require_split_of_file(path, split)
        yield from read_file(path)
    elif (path / MANIFEST).is_file():
        if split != "train":
            raise UserError(f"{path} is published by Ratchet and has no splits. Remove split={split}.")
        for shard in Artifact.open(path).shards:
            yield from read_file(shard)
    elif any((path / name).is_file() for name in (INFO, STATE, SPLITS)):
        yield from _saved_dataset(path, split)
    elif path.is_dir():
        if saved := sorted(file.parent.name for file in path.glob(f"*/{STATE}")):
            raise UserError(
                f"{path} holds the saved datasets {', '.join(saved)}, but no {SPLITS}. Name one: "
                f"source={path / saved[0]}"
            )
        for file in choose_files(path, split):
            yield from read_file(file)
    elif files := matches(path):
        for file in files:
            require_split_of_file(file, split)
        for file in files:
            yield from read_file(file)
    else:
        raise UserError(
            f"source {path} does not exist. Give a file, a pattern of files (data/part-*.jsonl.gz), a directory, or "
            "hf:ORG/NAME."
        )


def hub_parts(source: str) -> tuple[str, str | None, str | None]:
    """Split `hf:NAME[:CONFIG][@REVISION]` into name, configuration and revision; the name may be a local directory."""
    rest, _, revision = source.removeprefix(HUB).partition("@")
    name, _, config = rest.partition(":")
    return name, config or None, revision or None


def _saved_dataset(path: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a directory that `datasets` wrote with save_to_disk."""
    if (path / SPLITS).is_file():
        splits = _read_json(path / SPLITS).get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise UserError(f"{path / SPLITS} {DAMAGED}: it has no list of splits. {AGAIN}")
        if split not in splits:
            raise UserError(f"{path} has no split {split!r}, only {', '.join(splits)}. Set split.")
        path = path / split
    elif (own := _read_json(path / STATE).get("_split")) != split and split != "train":
        raise UserError(f"{path} has no splits{f', it is {own}' if own else ''}. Remove split={split}.")
    _read_json(path / INFO)
    files = _read_json(path / STATE).get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) and "filename" in file for file in files):
        raise UserError(f"{path / STATE} {DAMAGED}: it has no list of data files. {AGAIN}")
    for file in files:
        _require_whole(path / str(file["filename"]))
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # The files are intact, so dataset_info.json or state.json must be wrong.
        raise UserError(
            f"{path / INFO} or {STATE} does not fit the data: {type(error).__name__}: {first_line(error)}. {AGAIN}"
        ) from error
    for number, row in enumerate(loaded, 1):
        yield f"{path}, row {number}", row


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, so the save_to_disk directory {path.parent} is incomplete. {AGAIN}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} {DAMAGED}: not valid JSON ({error}). {AGAIN}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} {DAMAGED}: a {type(found).__name__}, but it must be a JSON object. {AGAIN}")
    return found


def _require_whole(path: Path) -> None:
    """Raise UserError unless an Arrow file exists and all its batches can be read."""
    import pyarrow

    if not path.is_file():
        raise UserError(f"{path} is missing, but {path.parent / STATE} lists it. {AGAIN}")
    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            for batch in stream:
                batch.validate()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} {DAMAGED}: {first_line(error)}. {AGAIN}") from error


def _hub(source: str, split: str) -> Iterator[Row]:
    import datasets

    name, config, revision = hub_parts(source)
    try:
        loaded = datasets.load_dataset(name, config, split=split, revision=revision)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        message = " ".join(str(error).splitlines()[:2]).rstrip(".")
        fix = "Check the name, the split and the network; HF_TOKEN for gated datasets."
        if "onfig" in message:  # "Config name is missing. ... available configs: [...]", "BuilderConfig 'x' not found"
            fix = f"Name one of its configurations: source={HUB}{name}:CONFIG."
        raise UserError(f"dataset {source} (split {split!r}) could not be loaded: {message}. {fix}") from error
    for number, row in enumerate(loaded, 1):
        yield f"{source}, row {number}", row
