"""Formats numbers, paths, durations and tables for printing."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # jobs on a cluster import this module, and print no tables
    from rich.console import Console, Group, RenderableType
    from rich.table import Table

LAST_COLUMN = 24
"""Minimum width in characters of a table's last column, which alone may be broken into lines."""
SEPARATOR = "  "


def plural(count: int, what: str) -> str:
    """A count with its noun, with an s unless it is 1."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def relative_path(path: Path) -> Path:
    """A path relative to the working directory, if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def format_megabytes(count: int) -> str:
    """A number of bytes in megabytes (10^6)."""
    return f"{count / 1e6:.1f} MB"


def format_ranges(values: Iterable[int]) -> str:
    """Numbers as ranges: 0-3, 6."""
    parts: list[list[int]] = []
    for value in sorted(set(values)):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def format_duration(seconds: float) -> str:
    """A duration with three digits, in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.3g} min"
    hours = seconds / 3600
    return f"{hours:.3g} h" if hours < 1000 else f"{hours:,.0f} h"


def printable(text: str) -> str:
    """Untrusted text with its control characters escaped, so that they do not act on the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)


def echo(console: "Console", *lines: str) -> None:
    """Print lines verbatim: no markup in a path or a reason, no line breaks but the terminal's own."""
    for start in range(0, len(lines), 1000):  # rich is slow with single lines, and with very many at once
        console.print("\n".join(lines[start : start + 1000]), soft_wrap=True, markup=False, highlight=False)


def fits_width(console: "Console", table: "Table") -> bool:
    """Whether a terminal is wide enough for a table of which only the last column may be broken into lines."""
    from rich.measure import Measurement

    options = console.options.update(width=10_000)
    last = [Measurement.get(console, options, cell).maximum for cell in table.columns[-1].cells]
    whole = Measurement.get(console, options, table).maximum
    return whole - max(0, max(last, default=0) - LAST_COLUMN) <= console.width


def stacked_table(console: "Console", table: "Table", head: str = "") -> "Group":
    """A table for a terminal that is too narrow for it: each row begins with its first value, followed by lines of the
    others with their column titles, as many per line as fit."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    title, *titles = (str(column.header) for column in table.columns)
    found: list[RenderableType] = [Text(str(head or table.title))] if head or table.title else []
    for first, *others in zip(*(map(str, column.cells) for column in table.columns), strict=True):
        found.append(Text.from_markup(f"{title} {first}" if first.isdecimal() else first, style="bold"))
        lines: list[Text] = []
        for name, value in zip(titles, others, strict=True):
            part = Text.from_markup(f"{name} {value}".strip() if value else "")
            if lines and part and lines[-1].cell_len + len(SEPARATOR) + part.cell_len <= console.width - len(SEPARATOR):
                lines[-1].append(SEPARATOR).append_text(part)
            elif part:
                lines.append(part)
        found += [Padding(line, (0, 0, 0, len(SEPARATOR))) for line in lines]
    return Group(*found)
