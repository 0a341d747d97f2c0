"""Writing a checkpoint in another layout: a set of files for each rank, or the whole files that it had, bit for bit.

Every file is written from its beginning to its end through a small buffer, several files side by side, so that memory
does not grow with the model. What a crash can leave, and what the same command does with it:

    hidden directory beside the output      keeps its finished files, makes the rest
    `*.tmp` in it                           deletes it
    the output                              nothing left to do

A file gets its name when it is on the disk, and the directory when all of its files have.
"""

import bisect
import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import queue
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from contracts.errors import UserError
from contracts.files import fsync, process_name, write_atomically
from contracts.fingerprint import MODEL_FILES, PROCESSOR_FILES, RELEASED, digest
from contracts.locks import LOCK, DirectoryLock
from contracts.manifest import MANIFEST, read_manifest
from contracts.publication import partial_directory
from contracts.weights import StoredTensor
from reallocation.layouts import REMAINDER, LocalPart, RankLayout, flat_part, require_complete
from reallocation.planning import Transfer, interleaved, item_bytes
from reallocation.stored import (
    ORIGIN,
    RECORD,
    DividedRecord,
    StoredModel,
    header_bytes,
    rank_file,
    read_exactly,
)

FILE_BYTES = 5 << 30
"""Largest file of a rank, unless one tensor is larger."""
PAGES = 64 << 10
"""Files are written by this many bytes, and where they lie alike copied: what the kernel moves at once (16 pages)."""
BUFFER = 64 << 10
"""Bytes that are written at once: for more the kernel looks for larger blocks of free memory, which costs it more."""
LONG = 128 << 10
"""Ranges from this on are copied by the kernel alone, where they lie as in the new file."""
WINDOW = 512 << 10
"""Bytes of rows that are read at once at most, where columns are cut out of them or put together to them."""
GAP = 32 << 10
"""Bytes between two runs of a row's columns that are read with them: a call of the system takes longer."""
RANGES = os.sysconf("SC_IOV_MAX")
"""Ranges of bytes that the kernel writes in one call."""
COPY_AT_ONCE = 4 << 20
HASHED_AT_ONCE = 1 << 20
WRITERS = min(4, os.cpu_count() or 1)
"""Files that are written side by side."""
NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""What file systems say that the kernel cannot copy between."""
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Files that hold the weights in other formats, which are not carried over."""


@dataclass(frozen=True)
class OutputFile:
    """A weights file to write."""

    name: str
    header: str
    items: tuple[tuple[str, LocalPart], ...]
    """Tensor and part of it, in the order of their places."""
    bytes: int


@dataclass(frozen=True)
class FileShare:
    """What one writer writes of a file."""

    header: bytes
    """What is before the tensors; empty but at the beginning of the file."""
    items: tuple[tuple[str, LocalPart], ...]
    start: int
    end: int
    """Its bytes in the file: from `start` until before `end`."""


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
    _write_files(model, directory, missing, published)
    for name, path in others.items():
        if not (directory / name).exists():
            with _new_file(directory / name) as scratch:
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
            header, size = _header(model, group)
            yield OutputFile(prefix + rank_file(rank, number), header, tuple(group), size)


def _header(model: StoredModel, items: Sequence[tuple[str, LocalPart]]) -> tuple[str, int]:
    """A safetensors header, and the bytes of the whole file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, part in items:
        dtype = model.tensors[name].dtype
        size = part.elements * item_bytes(dtype)
        entries[name.removeprefix(REMAINDER)] = {
            "dtype": dtype, "shape": list(part.shape), "data_offsets": [place, place + size],
        }  # fmt: skip
        place += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True)
    text += " " * _padding(model, items, 8 + len(text))
    return text, 8 + len(text) + place


def _padding(model: StoredModel, items: Sequence[tuple[str, LocalPart]], place: int) -> int:
    """Spaces behind a header that would end at `place`: to a multiple of 8, and if tensors are large so many that pages
    lie in the new file as in the old one. Most tensors are whole pages, so that it holds for all of them."""
    sizes = [part.elements * item_bytes(model.tensors[name].dtype) for name, part in items]
    largest = sizes.index(max(sizes))
    name, part = items[largest]
    first = model.transfers(name, part)[0]
    begin = model.sources[name][first.source].stored.start + first.source_start
    shift = (begin - first.target_start - sum(sizes[:largest]) - place) % PAGES
    return shift if sizes[largest] >= LONG and (place + shift) % 8 == 0 else -place % 8


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


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """The path to write a file at that gets its name when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{process_name()}.tmp")
    yield scratch
    fsync(scratch)
    os.replace(scratch, path)


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


def _write_files(
    model: StoredModel, directory: Path, outputs: Sequence[OutputFile], published: Mapping[str, str]
) -> None:
    """Write weights files, several side by side, and few of them by several writers each: a file system has one writer
    for each file at a time, but what the others write can be read meanwhile.

    Raises:
        UserError: a file is not the one whose SHA-256 is in `published`.
    """
    writers: queue.SimpleQueue[_Writer] = queue.SimpleQueue()

    def write_share(share: FileShare, scratch: Path, *, hashed: bool) -> str | None:
        writer = writers.get()
        try:
            return writer.write(share, scratch, hashed=hashed)
        finally:
            writers.put(writer)

    def write(output: OutputFile) -> None:
        hashed = output.name in published  # from its beginning to its end
        parts = shares_of(model, output, 1 if hashed else max(1, WRITERS // len(outputs)))
        with _new_file(directory / output.name) as scratch:
            writing = [helpers.submit(write_share, part, scratch, hashed=hashed) for part in parts]
            found, *_ = [share.result() for share in writing]
            if found != published.get(output.name):
                raise UserError(
                    f"{output.name}, put together from the files of the ranks in {model.path}, is not the one that "
                    f"was published: its SHA-256 is not that in {ORIGIN}/{MANIFEST}. A rank's file was changed or "
                    "damaged: divide the checkpoint again."
                )

    with contextlib.ExitStack() as stack:
        for _ in range(WRITERS):
            writers.put(stack.enter_context(_Writer(model)))
        helpers = stack.enter_context(concurrent.futures.ThreadPoolExecutor(WRITERS))
        files = stack.enter_context(concurrent.futures.ThreadPoolExecutor(WRITERS))
        list(files.map(write, outputs))


def shares_of(model: StoredModel, output: OutputFile, count: int) -> list[FileShare]:
    """Cut a file between tensors into at most `count` shares that are about as large."""
    header = output.header.encode()
    header = len(header).to_bytes(8, "little") + header
    ends = list(
        itertools.accumulate(
            (part.elements * item_bytes(model.tensors[name].dtype) for name, part in output.items), initial=len(header)
        )
    )
    wanted = [len(header) + (ends[-1] - len(header)) * number // count for number in range(1, count)]
    cuts = sorted({0, *(bisect.bisect_left(ends, place) for place in wanted), len(output.items)})
    pairs = list(itertools.pairwise(cuts)) or [(0, 0)]
    return [
        FileShare(b"" if first else header, output.items[first:last], ends[first] if first else 0, ends[last])
        for first, last in pairs
    ]


class _Writer:
    """Writes files from the parts of a model, whose files it keeps open.

    What is to be written is collected in a buffer that fits into a processor's cache, and leaves it in whole pages of
    the new file: the kernel is faster with that than with copying ranges that begin within a page. Columns are read
    with the rows that they are in, many rows at once, and leave that buffer from where they are.
    """

    def __init__(self, model: StoredModel) -> None:
        self._model = model
        self._files: dict[Path, int] = {}
        self._buffer = memoryview(bytearray(BUFFER))
        self._used = 0
        self._room = BUFFER
        """Bytes after which the buffer leaves at the end of a page."""
        self._window = memoryview(bytearray(WINDOW))
        self._target = -1
        self._written = 0
        """Where in the new file the buffer begins."""
        self._hashing: _Hashing | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def write(self, share: FileShare, path: Path, *, hashed: bool) -> str | None:
        """Write a share of a file and flush it to the disk; the SHA-256 of a whole file, where that is wanted."""
        self._written, self._used = share.start, 0
        self._room = BUFFER - share.start % PAGES
        with contextlib.ExitStack() as stack:
            self._target = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, self._target)
            self._hashing = stack.enter_context(_Hashing(self._target)) if hashed else None
            self._take(memoryview(share.header))
            for name, part in share.items:
                self._write_part(name, part)
            self._flush()
            if self._written != share.end:
                raise RuntimeError(f"{path} was written until {self._written} instead of {share.end}")
            os.fsync(self._target)
            return self._hashing.result(self._written) if self._hashing is not None else None

    def _write_part(self, name: str, part: LocalPart) -> None:
        sources = self._model.sources[name]
        for group in interleaved(self._model.transfers(name, part)):
            taken = [(transfer, sources[transfer.source].stored) for transfer in group]
            row = sum(max(transfer.source_stride, transfer.length) for transfer in group)
            apart = max(transfer.source_stride - transfer.length for transfer in group)
            if group[0].rows > 1 and row <= WINDOW and apart <= GAP and len(group) <= RANGES:
                self._write_rows(taken, row)
                continue
            for runs in zip(*(transfer.runs() for transfer in group), strict=True):
                for (_, begin, length), (_, stored) in zip(runs, taken, strict=True):
                    self._copy(stored, stored.start + begin, length)

    def _write_rows(self, taken: Sequence[tuple[Transfer, StoredTensor]], row: int) -> None:
        """Append rows, each made of one run of every transfer; `row` bytes are read for one."""
        self._flush()
        rows = taken[0][0].rows
        written = taken[0][0].target_stride
        several = max(1, min(WINDOW // row, BUFFER // written, RANGES // len(taken)))
        for first in range(0, rows, several):
            count = min(several, rows - first)
            place, columns = 0, []
            for transfer, stored in taken:
                stride, length = transfer.source_stride, transfer.length
                size = (count - 1) * stride + length
                start = stored.start + transfer.source_start + first * stride
                read_exactly(self._opened(stored), self._window[place : place + size], start, stored.file)
                columns.append((place, stride, length))
                place += size
            self._write(
                [
                    self._window[begin + number * stride : begin + number * stride + length]
                    for number in range(count)
                    for begin, stride, length in columns
                ]
            )

    def _take(self, view: memoryview) -> None:
        """Append bytes."""
        while len(view) > self._room - self._used:
            room = self._room - self._used
            self._buffer[self._used : self._room] = view[:room]
            self._used, view = self._room, view[room:]
            self._flush()
        self._buffer[self._used : self._used + len(view)] = view
        self._used += len(view)

    def _copy(self, stored: StoredTensor, start: int, length: int) -> None:
        """Append a range of a file: by the kernel alone where it lies as in the new file, which then may share it."""
        descriptor = self._opened(stored)
        if length >= LONG and (start - self._written - self._used) % PAGES == 0:
            ahead = -(self._written + self._used) % PAGES
            self._read(descriptor, start, ahead, stored.file)
            self._flush()
            copied = self._copy_range(descriptor, start + ahead, (length - ahead) // PAGES * PAGES)
            start, length = start + ahead + copied, length - ahead - copied
        self._read(descriptor, start, length, stored.file)

    def _read(self, descriptor: int, start: int, length: int, file: Path) -> None:
        while length:
            count = min(length, self._room - self._used)
            read_exactly(descriptor, self._buffer[self._used : self._used + count], start, file)
            self._used, start, length = self._used + count, start + count, length - count
            if self._used == self._room:
                self._flush()

    def _copy_range(self, descriptor: int, start: int, length: int) -> int:
        """How many bytes the kernel has copied; not all where the file system cannot."""
        copied = 0
        while copied < length:
            try:
                most = min(length - copied, COPY_AT_ONCE)
                count = os.copy_file_range(descriptor, self._target, most, start + copied, self._written)
            except OSError as error:
                if error.errno not in NO_COPY_RANGE:
                    raise
                break
            if count == 0:  # reading will tell
                break
            copied += count
            self._go_on(count)
        return copied

    def _flush(self) -> None:
        if self._used:
            self._write([self._buffer[: self._used]])
        self._used, self._room = 0, BUFFER - self._written % PAGES

    def _write(self, ranges: Sequence[memoryview]) -> None:
        left = sum(map(len, ranges))
        while left:
            count = os.pwritev(self._target, ranges, self._written)
            left -= count
            if left:  # the kernel has taken a part
                ranges = list(_behind(ranges, count))
            self._go_on(count)

    def _go_on(self, count: int) -> None:
        """Bytes have been written."""
        self._written += count
        if self._hashing is not None:
            self._hashing.go_on(self._written)

    def _opened(self, stored: StoredTensor) -> int:
        path = stored.file
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]


def _behind(ranges: Sequence[memoryview], count: int) -> Iterator[memoryview]:
    """What is left of some ranges without their first bytes."""
    for view in ranges:
        if count < len(view):
            yield view[count:]
        count = max(count - len(view), 0)


class _Hashing:
    """The SHA-256 of a file that is being written, by a thread that follows its end: nothing is read from the disk."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self._buffer = memoryview(bytearray(HASHED_AT_ONCE))
        self._place = self._asked = 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def __enter__(self) -> "_Hashing":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def go_on(self, end: int) -> None:
        """Let it hash what is before `end`, once that is enough."""
        if end - self._asked >= HASHED_AT_ONCE:
            self._asked = end
            self._thread.submit(self._hash, end)  # where it fails, `result` goes on, and fails as well

    def result(self, end: int) -> str:
        """Of all before `end`."""
        self._thread.submit(self._hash, end).result()
        return self._digest.hexdigest()

    def _hash(self, end: int) -> None:
        while self._place < end:
            count = os.preadv(self._descriptor, [self._buffer[: end - self._place]], self._place)
            if count == 0:
                raise RuntimeError(f"a file ends before byte {end}, which was written")
            self._digest.update(self._buffer[:count])
            self._place += count
