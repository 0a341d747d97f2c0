"""File locks, by which processes on all machines that share a file system exclude each other."""

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
"""Name of the file whose lock stands for the whole directory."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
POLL_SECONDS = 0.1
MOST_FAILURES = 20
"""How often the creation of a directory may fail because a parent is missing."""


def take_lock(file: IO[Any], operation: int) -> None:
    """Lock an open file (fcntl.LOCK_EX or LOCK_SH) without waiting; the lock ends with the process that holds it.

    Raises:
        BlockingIOError: another process holds it.
        UserError: the file system does not support locks.
    """
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise UserError(
                f"the file system of {Path(file.name).parent} has no file locks ({os.strerror(error.errno)}), without "
                "which processes could overwrite each other's files. Mount it with locks that hold on all machines "
                "(NFS 4, Lustre with -o flock, BeeGFS with tuneUseGlobalFileLocks=true), or choose a path on another "
                "file system."
            ) from error
        raise


def try_lock(file: IO[Any], operation: int) -> bool:
    """Try to lock an open file; False if another process holds the lock."""
    try:
        take_lock(file, operation)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for a file's lock, and hold it inside the block."""
    with path.open("a+") as file:
        while not try_lock(file, fcntl.LOCK_EX):
            time.sleep(0.05)
        yield


class DirectoryLock:
    """The lock of a directory in which an artifact is written; it ends with the process that holds it."""

    def __init__(self, directory: Path, target: Path) -> None:
        """`target` is the artifact that is written there, for messages."""
        self.directory = directory
        self.target = target
        self._file: IO[str] | None = None
        self._failures = 0

    def take(self, operation: int) -> bool:
        """Create the directory and lock it (fcntl.LOCK_EX or LOCK_SH); False if it was removed in the meantime.

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
        """Create the directory. A parent may be missing because another process is removing it, but not repeatedly."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            self._failures += 1
            if self._failures > MOST_FAILURES:
                raise UserError(
                    f"{self.target} cannot be created: no directory can be created in {self.directory.parent}. Choose "
                    "another path."
                ) from error
            raise

    def take_when_free(self, take: Callable[[], bool], patience: float) -> None:
        """Call `take` until it has taken the lock.

        Args:
            take: like the method `take` of this class.
            patience: seconds to wait for another process.

        Raises:
            UserError: another process holds the lock, and `patience` is 0.
            TransientError: another process still holds the lock after `patience`.
        """
        start, announced = time.monotonic(), False
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
                if waited > 1 and not announced:
                    print(f"waiting up to {patience:g} s for another process that is making {self.target}", flush=True)
                    announced = True
                time.sleep(POLL_SECONDS)
