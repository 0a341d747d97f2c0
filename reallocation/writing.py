"""Writes weights files from parts of a model, about as fast as the files could be copied.

Every file is written through a small buffer, several files in parallel, so that memory does not grow with the model. A
file is renamed to its final name when it is on the disk.
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
"""The alignment of writes, and of ranges that the kernel copies: the unit that it moves at a time (16 pages)."""
BUFFER = 64 << 10
"""Bytes per write: for larger ones the kernel looks for larger blocks of free memory, which is slower."""
LONG = 128 << 10
"""Ranges from this size on are copied within the kernel if they have the same alignment in both files."""
WINDOW = 512 << 10
"""The most bytes of rows that are read at a time when columns are cut out of them or joined into them."""
GAP = 32 << 10
"""Gaps of up to this many bytes between two runs are read along with them: another system call would take longer."""
RANGES = os.sysconf("SC_IOV_MAX")
"""The most ranges of bytes that the kernel writes in one call."""
COPY_AT_ONCE = 4 << 20
HASHED_AT_ONCE = 1 << 20
WRITERS = min(4, os.cpu_count() or 1)
"""The number of files that are written in parallel."""
NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""Errors of copy_file_range on file systems that do not support it."""


@dataclass(frozen=True)
class OutputFile:
    """A weights file to write."""

    name: str
    header: str
    items: tuple[tuple[str, LocalPart], ...]
    """(tensor name, part of the tensor), by position in the file."""
    bytes: int


@dataclass(frozen=True)
class FileShare:
    """The share of a file that one writer writes."""

    header: bytes
    """The bytes before the tensors; empty unless the share is the beginning of the file."""
    items: tuple[tuple[str, LocalPart], ...]
    start: int
    """The first byte of the share in the file."""
    end: int
    """The first byte after the share."""


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path to write to; afterwards flush the file to the disk and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{process_name()}.tmp")
    yield scratch
    fsync(scratch)
    os.replace(scratch, path)


def header_of(model: StoredModel, items: Sequence[tuple[str, LocalPart]]) -> tuple[str, int]:
    """The safetensors header of a new file, and the bytes of the whole file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, part in items:
        dtype = model.tensors[name].dtype
        size = part.elements * item_bytes(dtype)
        entries[name.removeprefix(REMAINDER)] = {
            "dtype": dtype, "shape": list(part.shape), "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True)
    text += " " * _padding(model, items, 8 + len(text))
    return text, 8 + len(text) + offset


def _padding(model: StoredModel, items: Sequence[tuple[str, LocalPart]], offset: int) -> int:
    """The number of spaces after a header that would end at `offset`: up to a multiple of 8, and if tensors are large,
    as many as align the largest one to pages as in its old file. Most tensors consist of whole pages, so that the
    others are aligned as well."""
    sizes = [part.elements * item_bytes(model.tensors[name].dtype) for name, part in items]
    largest = sizes.index(max(sizes))
    name, part = items[largest]
    first = model.transfers(name, part)[0]
    begin = model.sources[name][first.source].stored.start + first.source_start
    shift = (begin - first.target_start - sum(sizes[:largest]) - offset) % PAGES
    return shift if sizes[largest] >= LONG and (offset + shift) % 8 == 0 else -offset % 8


def write_files(
    model: StoredModel, directory: Path, outputs: Sequence[OutputFile], published: Mapping[str, str]
) -> None:
    """Write weights files in parallel; if there are few, several writers share each. A file system allows one writer
    per file at a time, but the others can read in the meantime.

    Args:
        published: the expected SHA-256 of files, by name.

    Raises:
        UserError: a file has another SHA-256 than the one in `published`.
    """
    writers: queue.SimpleQueue[_Writer] = queue.SimpleQueue()

    def write_share(share: FileShare, scratch: Path, *, hashed: bool) -> str | None:
        writer = writers.get()
        try:
            return writer.write(share, scratch, hashed=hashed)
        finally:
            writers.put(writer)

    def write(output: OutputFile) -> None:
        hashed = output.name in published  # hashing is sequential, so there is one writer
        parts = shares_of(model, output, 1 if hashed else max(1, WRITERS // len(outputs)))
        with new_file(directory / output.name) as scratch:
            writing = [helpers.submit(write_share, part, scratch, hashed=hashed) for part in parts]
            sha256, *_ = [share.result() for share in writing]
            if sha256 != published.get(output.name):
                raise UserError(
                    f"{output.name}, joined from the ranks' files in {model.path}, differs from the published file: "
                    f"its SHA-256 is not the one in {ORIGIN}/{MANIFEST}. A rank's file was changed or damaged: divide "
                    "the checkpoint again."
                )

    with contextlib.ExitStack() as stack:
        for _ in range(WRITERS):
            writers.put(stack.enter_context(_Writer(model)))
        helpers = stack.enter_context(concurrent.futures.ThreadPoolExecutor(WRITERS))
        files = stack.enter_context(concurrent.futures.ThreadPoolExecutor(WRITERS))
        list(files.map(write, outputs))


def shares_of(model: StoredModel, output: OutputFile, count: int) -> list[FileShare]:
    """Cut a file between tensors into at most `count` shares of about the same size."""
    header = output.header.encode()
    header = len(header).to_bytes(8, "little") + header
    ends = list(
        itertools.accumulate(
            (part.elements * item_bytes(model.tensors[name].dtype) for name, part in output.items), initial=len(header)
        )
    )
    wanted = [len(header) + (ends[-1] - len(header)) * number // count for number in range(1, count)]
    cuts = sorted({0, *(bisect.bisect_left(ends, position) for position in wanted), len(output.items)})
    pairs = list(itertools.pairwise(cuts)) or [(0, 0)]
    return [
        FileShare(b"" if first else header, output.items[first:last], ends[first] if first else 0, ends[last])
        for first, last in pairs
    ]


class _Writer:
    """Writes files from the parts of a model, and keeps the model's files open.

    Data is collected in a buffer that fits into a processor's cache, and written in whole pages of the new file, which
    is faster than letting the kernel copy ranges that begin within a page. Columns are read together with the rows that
    contain them, many rows at a time, and written directly from that read buffer.
    """

    def __init__(self, model: StoredModel) -> None:
        self._model = model
        self._files: dict[Path, int] = {}
        self._buffer = memoryview(bytearray(BUFFER))
        self._used = 0
        self._room = BUFFER
        """The fill level at which the buffer is written, so that the write ends at the end of a page."""
        self._window = memoryview(bytearray(WINDOW))
        self._target = -1
        self._written = 0
        """The position of the buffer's first byte in the new file."""
        self._hashing: _Hashing | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def write(self, share: FileShare, path: Path, *, hashed: bool) -> str | None:
        """Write a share of a file and flush it to the disk. With `hashed`, return the SHA-256 of the (whole) file."""
        self._written, self._used = share.start, 0
        self._room = BUFFER - share.start % PAGES
        with contextlib.ExitStack() as stack:
            self._target = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, self._target)
            self._hashing = stack.enter_context(_Hashing(self._target)) if hashed else None
            self._append(memoryview(share.header))
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
        """Append rows, each joined from one run of every transfer; `row` is the number of bytes read per row."""
        self._flush()
        rows = taken[0][0].rows
        written = taken[0][0].target_stride
        several = max(1, min(WINDOW // row, BUFFER // written, RANGES // len(taken)))
        for first in range(0, rows, several):
            count = min(several, rows - first)
            offset, columns = 0, []
            for transfer, stored in taken:
                stride, length = transfer.source_stride, transfer.length
                size = (count - 1) * stride + length
                start = stored.start + transfer.source_start + first * stride
                read_exactly(self._opened(stored), self._window[offset : offset + size], start, stored.file)
                columns.append((offset, stride, length))
                offset += size
            self._write(
                [
                    self._window[begin + number * stride : begin + number * stride + length]
                    for number in range(count)
                    for begin, stride, length in columns
                ]
            )

    def _append(self, view: memoryview) -> None:
        """Append bytes to the file, through the buffer."""
        while len(view) > self._room - self._used:
            room = self._room - self._used
            self._buffer[self._used : self._room] = view[:room]
            self._used, view = self._room, view[room:]
            self._flush()
        self._buffer[self._used : self._used + len(view)] = view
        self._used += len(view)

    def _copy(self, stored: StoredTensor, start: int, length: int) -> None:
        """Append a range of a stored file: within the kernel if it has the same alignment in the new file, in which
        case a file system may share the blocks."""
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
        """Copy a range within the kernel. Returns the number of bytes copied; fewer than `length` if the file system
        does not support it."""
        copied = 0
        while copied < length:
            try:
                most = min(length - copied, COPY_AT_ONCE)
                count = os.copy_file_range(descriptor, self._target, most, start + copied, self._written)
            except OSError as error:
                if error.errno not in NO_COPY_RANGE:
                    raise
                break
            if count == 0:  # the file is too short; the read that follows raises the error
                break
            copied += count
            self._advance(count)
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
            if left:  # a partial write
                ranges = list(_without_first(ranges, count))
            self._advance(count)

    def _advance(self, count: int) -> None:
        """Account for `count` written bytes."""
        self._written += count
        if self._hashing is not None:
            self._hashing.advance(self._written)

    def _opened(self, stored: StoredTensor) -> int:
        path = stored.file
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]


def _without_first(ranges: Sequence[memoryview], count: int) -> Iterator[memoryview]:
    """Drop the first `count` bytes of a sequence of ranges."""
    for view in ranges:
        if count < len(view):
            yield view[count:]
        count = max(count - len(view), 0)


class _Hashing:
    """Computes the SHA-256 of a file while it is written, in a thread that follows its end, so that it reads from the
    page cache and not from the disk."""

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

    def advance(self, end: int) -> None:
        """Let the thread hash the bytes before `end`, once there are enough new ones."""
        if end - self._asked >= HASHED_AT_ONCE:
            self._asked = end
            self._thread.submit(self._hash, end)  # if it fails, `result` tries again and raises the error

    def result(self, end: int) -> str:
        """The SHA-256 of all bytes before `end`."""
        self._thread.submit(self._hash, end).result()
        return self._digest.hexdigest()

    def _hash(self, end: int) -> None:
        while self._place < end:
            count = os.preadv(self._descriptor, [self._buffer[: end - self._place]], self._place)
            if count == 0:
                raise RuntimeError(f"a file ends before byte {end}, which was written")
            self._digest.update(self._buffer[:count])
            self._place += count
