"""Files that several processes, also on several machines, write and wait for: atomic writes and locks."""

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from contracts.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace a small file so that a reader sees the old or the new content; if `durable`, also after a power cut."""
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


def take_lock(file: IO[str], kind: int) -> None:
    """Lock an open file (fcntl.LOCK_EX or LOCK_SH) without waiting; the lock dies with its holder.

    Raises:
        BlockingIOError: another process holds it.
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise UserError(
                f"the file system of {Path(file.name).parent} has no file locks ({os.strerror(error.errno)}), by which "
                "processes keep out of each other's way. Mount it with locks that hold on all machines (NFS 4, Lustre "
                "with -o flock, BeeGFS with tuneUseGlobalFileLocks=true), or choose a path on another file system."
            ) from error
        raise


def appears(path: Path) -> bool:
    """Whether a file is there that another machine may have written just now.

    A file server's client may remember for up to a minute that it was not, unless it lists the folders.
    """
    if not path.exists():
        for folder in (path.parent.parent, path.parent):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.listdir(folder)
    return path.exists()


def process_name(pid: int | None = None) -> str:
    """What tells a process, by default this one, from all others on all machines that share a file system."""
    return f"{socket.gethostname()}-{pid or os.getpid()}"
