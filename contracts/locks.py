"""Locks of files, by which processes on all machines of a file system keep out of each other's way."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from contracts.errors import TransientError, UserError

LOCK = ".lock"
"""The file in a directory that is locked for all of it."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
POLL_SECONDS = 0.1
MOST_FAILURES = 20
"""How often a directory may not be there while it is made."""


def take_lock(file: IO[Any], operation: int) -> None:
    """Lock an open file (fcntl.LOCK_EX or LOCK_SH) without waiting; the lock dies with its holder.

    Raises:
        BlockingIOError: another process holds it.
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise UserError(
                f"the file system of {Path(file.name).parent} has no file locks ({os.strerror(error.errno)}), by which "
                "processes keep out of each other's way. Mount it with locks that hold on all machines (NFS 4, Lustre "
                "with -o flock, BeeGFS with tuneUseGlobalFileLocks=true), or choose a path on another file system."
            ) from error
        raise


def try_lock(file: IO[Any], operation: int) -> bool:
    """Take a lock, or say at once that somebody else holds it."""
    try:
        take_lock(file, operation)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, waiting for it."""
    with path.open("a+") as file:
        while not try_lock(file, fcntl.LOCK_EX):
            time.sleep(0.05)
        yield


class DirectoryLock:
    """The lock of a directory in which something is made; it dies with its holder."""

    def __init__(self, directory: Path, target: Path) -> None:
        """`target` is what is made there, for messages."""
        self.directory = directory
        self.target = target
        self._file: IO[str] | None = None
        self._failures = 0

    def take(self, operation: int) -> bool:
        """Make the directory and lock it (fcntl.LOCK_EX or LOCK_SH); False if the directory went meanwhile.

        Raises:
            BlockingIOError: another process holds it.
        """
        path = self.directory / LOCK
        try:
            self._make()
            self._file = path.open("a+")  # NFS gives a shared lock to readers only, an exclusive one to writers
            take_lock(self._file, operation)
            return path.exists() and os.path.samestat(os.fstat(self._file.fileno()), path.stat())
        except (FileNotFoundError, FileExistsError):
            if self.directory.is_file():
                raise
            return False

    def _make(self) -> None:
        """Make the directory. That something on the way to it does not exist may be another process's doing, but not
        again and again."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            self._failures += 1
            if self._failures > MOST_FAILURES:
                raise UserError(
                    f"{self.target} cannot be made: {self.directory.parent} takes no directories. Choose another path."
                ) from error
            raise

    def when_free(self, take: Callable[[], bool], patience: float) -> None:
        """Call `take` until it has the lock.

        Args:
            take: as this lock's own.
            patience: seconds to wait for another process.

        Raises:
            UserError: another process holds it, and there is no patience.
            TransientError: it still does when the patience has run out.
        """
        start, told = time.monotonic(), False
        while True:
            try:
                if take():
                    return
            except BlockingIOError as error:
                waited = time.monotonic() - start
                if not patience:
                    raise UserError(
                        f"another process is making {self.target} right now. Wait for it, or choose another output."
                    ) from error
                if waited > patience:
                    raise TransientError(
                        f"another process has been making {self.target} for the {patience:g} s that this one waited "
                        f"for the lock {self.directory / LOCK}. If its machine died, the file server lets go soon."
                    ) from error
                if waited > 1 and not told:
                    print(f"waiting up to {patience:g} s for another process that is making {self.target}", flush=True)
                    told = True
                time.sleep(POLL_SECONDS)
