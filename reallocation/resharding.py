"""Writing a checkpoint in another layout: a set of files for each rank, or the whole files that it had, bit for bit.

Memory does not grow with the model (reallocation/writing.py). What a crash can leave, and what the same command does
with it:

    hidden directory beside the output      keeps its finished files, makes the rest
    `*.tmp` in it                           deletes it
    the output                              nothing left to do

A file gets its name when it is on the disk, and the directory when all of its files have.
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
"""Largest file of a rank, unless one tensor is larger."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Files that hold the weights in other formats, which are not carried over."""


@dataclass(frozen=True)
class Resharded:
    """What was written."""

    path: Path
    layout: RankLayout
    files: int
    bytes: int
    """Of the weights."""
    ranks: int
    left_out: tuple[str, ...]
    """Files of the checkpoint that hold the weights in another format."""
    was_there: bool
    """Whether it had been written before."""
    compared: int
    """Files whose bytes are those that a run has published, by their SHA-256. Of the others names, shapes and sizes are
    checked, and no bytes: nothing says what they should be."""


def reshard(model: StoredModel, layout: RankLayout, target: Path) -> Resharded:
    """Write a checkpoint in another layout.

    Args:
        model: the checkpoint, in any layout.
        layout: with one rank, the whole files come back as they were when they were divided.
        target: the directory to make.

    Raises:
        UserError: the model is not all that its config.json says, the layout does not divide it, the target is
            something else, another process makes it, or the disk has no room for it.
    """
    require_complete(model.config, model.tensors, str(model.path))
    divided = layout.ranks > 1
    record, outputs = _divided(model, layout) if divided else (None, _whole(model))
    others, left_out = _others(model, divided)
    total = sum(output.bytes for output in outputs)
    published = {} if divided else _published(model)
    compared = sum(output.name in published for output in outputs)
    ranks = layout.ranks if divided else 1
    found = Resharded(target, layout, len(outputs), total, ranks, tuple(left_out), False, compared)
    there = replace(found, was_there=True, compared=0)
    key = record.key if record is not None else _key(model, layout)
    if target.exists():
        _require_same(target, record, outputs)
        return there
    directory = partial_directory(target, key)
    lock = DirectoryLock(directory, target)
    lock.when_free(lambda: lock.take(fcntl.LOCK_EX), 0)
    if target.exists():  # another process has made it meanwhile
        shutil.rmtree(directory)
        _require_same(target, record, outputs)
        return there
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
    return found


def _divided(model: StoredModel, layout: RankLayout) -> tuple[DividedRecord, list[OutputFile]]:
    """The files of every rank that differs from those before it."""
    division = model.division(layout)
    owners: dict[tuple[tuple[str, LocalPart], ...], int] = {}
    files: dict[str, tuple[str, ...]] = {}
    copies: dict[str, int] = {}
    outputs: list[OutputFile] = []
    for rank in range(layout.ranks):
        held = tuple((name, part) for name, part in division.of_rank(rank).items() if part.elements)
        if held in owners:
            copies[str(rank)] = owners[held]
            continue
        owners[held] = rank
        made = list(_files_of_rank(model, rank, held))
        files[str(rank)] = tuple(output.name for output in made)
        outputs += made
    key = _key(model, layout)
    return DividedRecord(1, str(layout), key, dict(model.config), model.files, files, copies), outputs


def _files_of_rank(model: StoredModel, rank: int, held: Sequence[tuple[str, LocalPart]]) -> Iterator[OutputFile]:
    for prefix in ("", REMAINDER):
        items = [(name, part) for name, part in held if name.startswith(REMAINDER) == bool(prefix)]
        items.sort(key=lambda each: (-item_bytes(model.tensors[each[0]].dtype), each[0]))  # keeps numbers aligned
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


def _whole(model: StoredModel) -> list[OutputFile]:
    """The files that the model was made of."""
    outputs = []
    for file in model.files:
        prefix = REMAINDER if file.name.startswith(REMAINDER) else ""
        placed = model.placed[file.name].values()
        names = [prefix + tensor.name for tensor in placed]
        items = tuple((name, flat_part(model.tensors[name], 0, model.tensors[name].elements)) for name in names)
        size = max((tensor.end for tensor in placed), default=8 + len(file.header.encode()))
        outputs.append(OutputFile(file.name, file.header, items, size))
    return outputs


def _others(model: StoredModel, divided: bool) -> tuple[dict[str, Path], list[str]]:
    """The files beside the weights by their names in the output, and those that are left out."""
    weights = {file.name for file in model.files} | {RECORD, LOCK}
    if model.record is not None:
        weights |= {name for files in model.record.ranks.values() for name in files}
    found, left_out = {}, []
    for path in sorted(model.path.rglob("*")):
        name = path.relative_to(model.path).as_posix()
        if not path.is_file() or name in weights:
            continue
        name = name.removeprefix(f"{ORIGIN}/")
        if name == RELEASED:
            raise UserError(f"the weights of {model.path} were deleted by `pipeline gc`. Have them made again first.")
        if path.suffix in OTHER_WEIGHTS:
            left_out.append(name)
        else:
            stays = not divided or name in (*MODEL_FILES, *PROCESSOR_FILES)
            found[name if stays else f"{ORIGIN}/{name}"] = path
    return found, left_out


def _key(model: StoredModel, layout: RankLayout) -> str:
    """Identifies the output by the states of the files that it is made from."""
    states = [
        (path.relative_to(model.path).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(model.path.rglob("*"))
        if path.is_file() and path.name != LOCK
    ]
    return digest([str(layout), states, [msgspec.to_builtins(file) for file in model.files]])


def _require_same(target: Path, record: DividedRecord | None, outputs: Sequence[OutputFile]) -> None:
    """Raise UserError unless the target is what would be written, as far as headers and sizes say."""
    try:
        there = (
            record is None or msgspec.json.decode((target / RECORD).read_bytes(), type=DividedRecord).key == record.key
        )
        there = there and (record is not None or not (target / RECORD).exists())
        there = there and all(
            (target / output.name).stat().st_size == output.bytes
            and header_bytes(target / output.name) == output.header
            for output in outputs
        )
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        there = False
    if not there:
        raise UserError(
            f"output {target} exists and is not what would be written there. Choose another by --output, or remove it."
        )


def _require_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{directory.parent} has {free / 1e9:.1f} GB free, and the weights take {needed / 1e9:.1f} GB. Free some "
            "space, or choose another disk with --output."
        )


def _published(model: StoredModel) -> dict[str, str]:
    """SHA-256 of the whole files that a divided checkpoint was made of, where its manifest is in `origin/`."""
    path = model.path / ORIGIN / MANIFEST
    if not path.is_file():
        return {}
    try:
        return {file.path: file.sha256 for file in read_manifest(path.read_bytes()).files}
    except msgspec.DecodeError:  # something else of this name, of another's checkpoint
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not what was published ({error}). Divide the checkpoint again.") from error
