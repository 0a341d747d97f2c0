"""Writing weights files from parts of a model, bit for bit, as fast as the files could be copied.

Every file is written through a small buffer, several files side by side, so that memory does not grow with the model. A
file gets its name when it is on the disk.
"""

import bisect
import concurrent.futures
import contextlib
import errno
import hashlib
import itertools
import json
import os
import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import UserError
from contracts.files import fsync, process_name
from contracts.manifest import MANIFEST
from contracts.weights import StoredTensor
from reallocation.layouts import REMAINDER, LocalPart
from reallocation.planning import Transfer, interleaved, item_bytes
from reallocation.stored import ORIGIN, StoredModel, read_exactly

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


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """The path to write a file at that gets its name when it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{process_name()}.tmp")
    yield scratch
    fsync(scratch)
    os.replace(scratch, path)


def header_of(model: StoredModel, items: Sequence[tuple[str, LocalPart]]) -> tuple[str, int]:
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


def write_files(
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
        with new_file(directory / output.name) as scratch:
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
