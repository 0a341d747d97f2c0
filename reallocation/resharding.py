"""Writes a checkpoint in another layout: a set of files for each rank, or the original whole files, bit for bit.

Memory does not grow with the model (reallocation/writing.py). A crash can leave the following, which the same command
handles when it is run again:

    hidden directory next to the output     keeps its finished files, writes the others
    `*.tmp` in it                           deletes them
    the output                              has nothing left to do

A file is renamed to its final name when it is on the disk, and the directory when all of its files are.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from contracts.errors import UserError
from contracts.files import fsync, write_atomically
from contracts.fingerprint import MODEL_FILES, PROCESSOR_FILES, RELEASED, digest
from contracts.locks import LOCK, DirectoryLock
from contracts.manifest import MANIFEST, read_manifest
from contracts.publication import partial_directory
from reallocation.layouts import REMAINDER, LocalPart, RankLayout, flat_part, require_complete
from reallocation.planning import item_bytes
from reallocation.stored import (
    ORIGIN,
    RECORD,
    DividedRecord,
    StoredModel,
    header_bytes,
    rank_file,
)
from reallocation.writing import OutputFile, header_of, new_file, write_files

FILE_BYTES = 5 << 30
"""The largest file of a rank, unless one tensor is larger."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Suffixes of files with weights in other formats, which are not copied."""


@dataclass(frozen=True)
class ReshardResult:
    """The result of `reshard`."""

    path: Path
    layout: RankLayout
    files: int
    bytes: int
    """Bytes of the weights."""
    ranks: int
    left_out: tuple[str, ...]
    """Files of the checkpoint that were not copied because they hold the weights in another format."""
    was_there: bool
    """Whether the output already existed."""
    compared: int
    """The number of files whose SHA-256 was compared with that of the published file. For other files only names,
    shapes and sizes are checked, since their expected bytes are not known."""


def reshard(model: StoredModel, layout: RankLayout, target: Path) -> ReshardResult:
    """Write a checkpoint in another layout.

    Args:
        model: the checkpoint, in any layout.
        layout: the layout to write; with one rank, the whole files are restored as they were before the division.
        target: the directory to create.

    Raises:
        UserError: the model does not have all tensors that its config.json implies, the layout does not divide it, the
            target exists with other content, another process is writing it, or the disk has too little space.
    """
    require_complete(model.config, model.tensors, str(model.path))
    divided = layout.ranks > 1
    record, outputs = _rank_files(model, layout) if divided else (None, _whole_files(model))
    others, left_out = _other_files(model, divided)
    total = sum(output.bytes for output in outputs)
    published = {} if divided else _published(model)
    compared = sum(output.name in published for output in outputs)
    ranks = layout.ranks if divided else 1
    result = ReshardResult(target, layout, len(outputs), total, ranks, tuple(left_out), False, compared)
    existing = replace(result, was_there=True, compared=0)
    key = record.key if record is not None else _input_digest(model, layout)
    if target.exists():
        _require_same(target, record, outputs)
        return existing
    directory = partial_directory(target, key)
    lock = DirectoryLock(directory, target)
    lock.take_when_free(lambda: lock.take(fcntl.LOCK_EX), 0)
    if target.exists():  # another process has written it in the meantime
        shutil.rmtree(directory)
        _require_same(target, record, outputs)
        return existing
    for path in [*directory.rglob("*.tmp")]:
        path.unlink()
    missing = [output for output in outputs if not (directory / output.name).exists()]
    _require_room(directory, sum(output.bytes for output in missing))
    write_files(model, directory, missing, published)
    for name, path in others.items():
        if not (directory / name).exists():
            with new_file(directory / name) as scratch:
                shutil.copyfile(path, scratch)
    if record is not None:
        write_atomically(directory / RECORD, msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    for folder in {path.parent for path in directory.rglob("*")}:
        fsync(folder)
    (directory / LOCK).unlink(missing_ok=True)
    os.rename(directory, target)
    fsync(target.parent)
    return result


def _rank_files(model: StoredModel, layout: RankLayout) -> tuple[DividedRecord, list[OutputFile]]:
    """The record, and the files of every rank whose parts differ from those of all ranks before it."""
    division = model.division(layout)
    owners: dict[tuple[tuple[str, LocalPart], ...], int] = {}
    files: dict[str, tuple[str, ...]] = {}
    copies: dict[str, int] = {}
    outputs: list[OutputFile] = []
    for rank in range(layout.ranks):
        held = tuple((name, part) for name, part in division.parts_of_rank(rank).items() if part.elements)
        if held in owners:
            copies[str(rank)] = owners[held]
            continue
        owners[held] = rank
        made = list(_files_of_rank(model, rank, held))
        files[str(rank)] = tuple(output.name for output in made)
        outputs += made
    key = _input_digest(model, layout)
    return DividedRecord(1, str(layout), key, dict(model.config), model.files, files, copies), outputs


def _files_of_rank(model: StoredModel, rank: int, held: Sequence[tuple[str, LocalPart]]) -> Iterator[OutputFile]:
    for prefix in ("", REMAINDER):
        items = [(name, part) for name, part in held if name.startswith(REMAINDER) == bool(prefix)]
        items.sort(key=lambda each: (-item_bytes(model.tensors[each[0]].dtype), each[0]))  # keeps elements aligned
        groups: list[list[tuple[str, LocalPart]]] = []
        used = 0
        for name, part in items:
            size = part.elements * item_bytes(model.tensors[name].dtype)
            if not groups or used + size > FILE_BYTES:
                groups.append([])
                used = 0
            groups[-1].append((name, part))
            used += size
        for number, group in enumerate(groups):
            header, size = header_of(model, group)
            yield OutputFile(prefix + rank_file(rank, number), header, tuple(group), size)


def _whole_files(model: StoredModel) -> list[OutputFile]:
    """The original whole files of the model."""
    outputs = []
    for file in model.files:
        prefix = REMAINDER if file.name.startswith(REMAINDER) else ""
        file_tensors = model.file_tensors[file.name].values()
        names = [prefix + tensor.name for tensor in file_tensors]
        items = tuple((name, flat_part(model.tensors[name], 0, model.tensors[name].elements)) for name in names)
        size = max((tensor.end for tensor in file_tensors), default=8 + len(file.header.encode()))
        outputs.append(OutputFile(file.name, file.header, items, size))
    return outputs


def _other_files(model: StoredModel, divided: bool) -> tuple[dict[str, Path], list[str]]:
    """The files other than weights by their names in the output, and the names of those that are not copied."""
    weights = {file.name for file in model.files} | {RECORD, LOCK}
    if model.record is not None:
        weights |= {name for files in model.record.ranks.values() for name in files}
    copied, left_out = {}, []
    for path in sorted(model.path.rglob("*")):
        name = path.relative_to(model.path).as_posix()
        if not path.is_file() or name in weights:
            continue
        name = name.removeprefix(f"{ORIGIN}/")
        if name == RELEASED:
            raise UserError(f"the weights of {model.path} were deleted by `pipeline gc`. Rebuild them first.")
        if path.suffix in OTHER_WEIGHTS:
            left_out.append(name)
        else:
            stays = not divided or name in (*MODEL_FILES, *PROCESSOR_FILES)
            copied[name if stays else f"{ORIGIN}/{name}"] = path
    return copied, left_out


def _input_digest(model: StoredModel, layout: RankLayout) -> str:
    """A digest that identifies the output: of the layout, and the size and modification time of all input files."""
    states = [
        (path.relative_to(model.path).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(model.path.rglob("*"))
        if path.is_file() and path.name != LOCK
    ]
    return digest([str(layout), states, [msgspec.to_builtins(file) for file in model.files]])


def _require_same(target: Path, record: DividedRecord | None, outputs: Sequence[OutputFile]) -> None:
    """Raise UserError unless the target has the headers and sizes of the files that would be written."""
    try:
        same = (
            record is None or msgspec.json.decode((target / RECORD).read_bytes(), type=DividedRecord).key == record.key
        )
        same = same and (record is not None or not (target / RECORD).exists())
        same = same and all(
            (target / output.name).stat().st_size == output.bytes
            and header_bytes(target / output.name) == output.header
            for output in outputs
        )
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        same = False
    if not same:
        raise UserError(
            f"output {target} exists with other content. Choose another output with --output, or remove it."
        )


def _require_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{directory.parent} has {free / 1e9:.1f} GB free, and the weights take {needed / 1e9:.1f} GB. Free some "
            "space, or choose another disk with --output."
        )


def _published(model: StoredModel) -> dict[str, str]:
    """SHA-256 of a divided checkpoint's original files by name, if their manifest is in `origin/`."""
    path = model.path / ORIGIN / MANIFEST
    if not path.is_file():
        return {}
    try:
        return {file.path: file.sha256 for file in read_manifest(path.read_bytes()).files}
    except msgspec.DecodeError:  # a file of the same name that Ratchet did not write
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not the published manifest ({error}). Divide the checkpoint again.") from error
