"""Reads rows from JSON Lines, JSON, CSV, TSV and Parquet files; the text formats may be compressed.

Every row comes with its place, and errors name the damaged file and row.
"""

import bz2
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from contracts.errors import UserError
from contracts.jsonl import COMPRESSED

Row = tuple[str, dict[str, Any]]
"""The place of a row, for messages ("file.jsonl, line 3"), and its columns."""

WRAPPERS = ("data", "rows", "instances", "examples", "items", "records")
"""Keys under which a JSON file may contain its list of rows."""
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "eval"}
BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
DAMAGED = "is cut off or damaged"
AGAIN = "Download or write it again."


def is_readable(path: Path) -> bool:
    """Whether a file can be read, judging by its suffix."""
    return format_of(path) in READERS


def suffixes() -> tuple[str, ...]:
    """The suffixes of files that can be read."""
    return tuple(READERS)


def format_of(path: Path) -> str:
    """The suffix of a file's name without that of its compression, such as ".jsonl"; empty for Parquet files that are
    compressed again, which are not supported."""
    found = Path(path.stem).suffix if path.suffix in OPENERS else path.suffix
    return "" if path.suffix in OPENERS and found == ".parquet" else found


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file.

    Raises:
        UserError: the file's format is unknown, or it is damaged; the message names the file and the row.
    """
    reader = READERS.get(format_of(path))
    if reader is None:
        raise UserError(
            f"{path} ends with {''.join(path.suffixes[-2:])!r}, but can be read only where it ends with one of "
            f"{', '.join(READERS)} (all but .parquet also with {', '.join(OPENERS)}). Convert it to JSON Lines: one "
            "JSON object a line."
        )
    with _damage_as_user_error(path):
        yield from reader(path)


@contextlib.contextmanager
def _damage_as_user_error(path: Path) -> Iterator[None]:
    """Turn exceptions of libraries about a file's content into UserErrors; errors of the disk are raised unchanged."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} {DAMAGED}: {error}. {AGAIN}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path} {DAMAGED}: {first_line(error)}. {AGAIN}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, without its full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def _open(path: Path) -> BinaryIO:
    stored = path if path.exists() else path.with_name(path.name + COMPRESSED)
    file = OPENERS.get(stored.suffix, Path.open)(stored, "rb")
    return io.BufferedReader(file)  # type: ignore[return-value, arg-type]


def _zstd(path: Path, mode: str) -> Any:
    return _pyarrow(path).input_stream(str(path), compression="zstd")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"{path} needs pyarrow, which this Python does not have. Use that of the stage's environment "
            "(`pipeline env python annotation`), or convert the file to JSON Lines."
        ) from error
    return pyarrow


OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return made


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _decode(content: bytes, place: str, hint: str) -> Any:
    try:
        return _decoder.decode(content.decode())
    except UnicodeDecodeError as error:
        wrong = content[error.start : error.start + 1].hex()
        raise UserError(
            f"{place}: not UTF-8 text (the byte 0x{wrong}, {error.start + 1} bytes into it). Save the file as UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:
        why = "it holds NUL bytes, as after a crash of the machine that wrote it" if b"\0" in content else error
        raise UserError(f"{place}: not valid JSON ({why}). {hint}") from error


def _json(path: Path) -> Iterator[Row]:
    """Read JSON Lines, or one JSON document: a list of rows, an object that contains such a list, or a single row."""
    hint = "Each line must be one JSON object, with each key once."
    with _open(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
        number, first = next(lines, (1, b""))
        if first.startswith(UTF_16):
            raise UserError(f"{path} is UTF-16 text. Save it as UTF-8.")
        first = first.removeprefix(BOM)
        if not first:
            return
        if first.lstrip().startswith(b"["):
            yield from _rows(path, _decode(first + file.read(), f"{path}, a JSON list", AGAIN))
            return
        try:
            row = _decode(first, f"{path}, line {number}", hint)
        except UserError as error:  # a damaged line, or the beginning of a document of several lines
            try:
                document = _decode(first + file.read(), str(path), AGAIN)
            except UserError:
                raise error from None
            yield from _rows(path, document)
            return
        second = next(lines, None)
        if second is None:
            yield from _rows(path, row)
            return
        yield _checked(row, f"{path}, line {number}")
        for number, line in itertools.chain([second], lines):
            place = f"{path}, line {number}"
            yield _checked(_decode(line, place, hint), place)


def _rows(path: Path, document: Any) -> Iterator[Row]:
    """Yield the rows of a JSON document."""
    where = ""
    if isinstance(document, dict):
        tables = [name for name, value in document.items() if _is_table(value)]
        if len(tables) > 1 and set(tables) <= SPLITS:
            raise UserError(
                f"{path} holds several lists of rows: {', '.join(tables)}. Write the one to be read into a file of its "
                "own."
            )
        wrappers = [name for name in WRAPPERS if name in tables]
        where = f" of {wrappers[0]!r}" if wrappers else ""
        document = document[wrappers[0]] if wrappers else [document]
    if not isinstance(document, list):
        raise UserError(f"{path}: a {type(document).__name__}, but rows must be JSON objects.")
    for number, row in enumerate(document, 1):
        yield _checked(row, f"{path}, row {number}{where}" if where or len(document) > 1 else f"{path}, line 1")


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _checked(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place}: a {type(row).__name__}, but each row must be one JSON object.")
    return place, row


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    """Read rows of text cells below a header; an empty cell is None."""
    csv.field_size_limit(1 << 30)
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        number = 1
        try:
            header = next(rows, [])
            if double := [name for name in header if header.count(name) > 1]:
                raise UserError(f"{path}: the column {double[0]!r} occurs twice. Rename one.")
            for number, cells in enumerate(rows, 2):
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"{path}, row {number}: {len(cells)} cells under {len(header)} columns. Put cells that hold "
                        f"{delimiter!r} or line breaks into quotes."
                    )
                if any("\0" in cell for cell in cells):
                    raise UserError(f"{path}, row {number}: it holds NUL bytes, so the file is damaged. {AGAIN}")
                if any(cells):
                    yield (
                        f"{path}, row {number}",
                        {name: cell or None for name, cell in zip(header, cells, strict=True)},
                    )
        except csv.Error as error:
            raise UserError(f"{path}, row {number}: not valid CSV: {error}. {AGAIN}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, after row {number}: not UTF-8 text: {error.reason}. Save it as UTF-8.") from error


def _comma(path: Path) -> Iterator[Row]:
    return _table(path, ",")


def _tab(path: Path) -> Iterator[Row]:
    return _table(path, "\t")


def _parquet(path: Path) -> Iterator[Row]:
    pyarrow = _pyarrow(path)
    from pyarrow import parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if double := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: the column {double[0]!r} occurs twice. Rename one.")
        for batch in file.iter_batches(batch_size=BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {number}: a text is not UTF-8: {error.reason}. {AGAIN}") from error
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if number == 0 and not _has_parquet_ends(path):
            raise UserError(f"{path} is not a Parquet file, or cut off: {first_line(error)}. {AGAIN}") from error
        raise UserError(f"{path} {DAMAGED} after row {number}: {first_line(error)}. {AGAIN}") from error


def _has_parquet_ends(path: Path) -> bool:
    with path.open("rb") as file:
        begin = file.read(4)
        file.seek(-min(4, path.stat().st_size), io.SEEK_END)
        return begin == file.read() == b"PAR1"


BATCH = 8192
"""Number of rows of a Parquet file in memory at a time."""
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _comma,
    ".tsv": _tab,
    ".parquet": _parquet,
}
