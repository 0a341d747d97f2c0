"""Helpers for files that several processes, possibly on several machines, write and wait for."""

import contextlib
import os
import socket
from pathlib import Path


def matches(pattern: Path) -> list[Path]:
    """The files that match a pattern with `*`, `?`, `[...]` or `**`, sorted by name.

    Empty if it is not a pattern, or if a path with exactly this name exists.
    """
    first = next((place for place, part in enumerate(pattern.parts) if any(sign in part for sign in "*?[")), None)
    if first is None or pattern.exists():
        return []
    found = Path(*pattern.parts[:first]).glob(str(Path(*pattern.parts[first:])))
    return sorted(path for path in found if path.is_file() and not path.name.startswith((".", "_")))


def exists_or_matches(path: Path) -> bool:
    """Whether the path exists, or matches files as a pattern."""
    return path.exists() or bool(matches(path))


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace a small file so that a reader sees either the old or the new content; if `durable`, even after a power
    failure."""
    scratch = path.with_name(f"{path.name}.{process_name()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exists_uncached(path: Path) -> bool:
    """Whether a file exists that another machine may have written just now.

    An NFS client may cache for up to a minute that it did not exist, unless the parent directories are listed.
    """
    if not path.exists():
        for folder in (path.parent.parent, path.parent):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.listdir(folder)
    return path.exists()


def process_name(pid: int | None = None) -> str:
    """A name for a process, by default this one, that is unique among the machines that share a file system."""
    return f"{socket.gethostname()}-{pid or os.getpid()}"
