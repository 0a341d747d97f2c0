"""Classifies failures as a user's mistake, a transient failure or a bug."""

import difflib
import errno
import os
import re
from collections.abc import Iterable

from contracts.limits import limit_message

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
UNUSABLE_PATH = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EPERM,
    errno.EROFS,
)


TRANSIENT_CODES = (
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
)
TRANSIENT_NAMES = (
    "AcceleratorError",
    "ConnectError",
    "ConnectTimeout",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "ReadTimeout",
    "URLError",
)
"""Error types of torch and of HTTP libraries, which are not imported here: a lost device, peer or connection."""


class UserError(Exception):
    """A mistake that the user can fix: one message with the thing, the value and the fix; exit code 2.

    Every other exception is a bug or a transient failure, with exit code 1; a bug also shows its traceback.
    """

    exit_code = 2


class TransientError(Exception):
    """A transient failure: a retry of the same command is likely to succeed. One message, no traceback; exit code 1."""


class RunStoppedError(Exception):
    """A gate has stopped the run."""

    exit_code = 3

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason} No stage of a later iteration is started. To continue nevertheless, change the gate, or apply "
            "it to later iterations only (`first`)."
        )


def as_user_error(error: Exception) -> UserError | None:
    """The error as a UserError, if the user can fix it (a full disk, an unusable path); otherwise None."""
    if isinstance(error, UserError):
        return error
    if limit := limit_message(error):
        return UserError(limit)
    code, path = system_code(error), getattr(error, "filename", None)
    if code in DISK_FULL:
        where = f" ({path})" if path else ""
        return UserError(
            f"the disk is full{where}: {os.strerror(code)}. Free some space; the same command continues, and what has "
            "been published is kept."
        )
    if code in UNUSABLE_PATH and path:
        return UserError(f"{path}: {os.strerror(code)}. Choose another path, or change its permissions.")
    return None


def system_code(error: BaseException) -> int | None:
    """The errno of an error; Rust libraries (safetensors, tokenizers) have it only in their message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def is_transient(error: BaseException) -> bool:
    """Whether a retry is likely to succeed: a connection, device, peer or file server was lost."""
    if isinstance(error, TransientError | ConnectionError | TimeoutError):
        return True
    if system_code(error) in TRANSIENT_CODES:
        return True
    return any(base.__name__ in TRANSIENT_NAMES for base in type(error).__mro__)


def did_you_mean(wrong: str, known: Iterable[str], most: int = 1) -> str:
    """A hint at the known names closest to a wrong one, " Did you mean 'x' or 'y'?"; empty if none is close."""
    near = difflib.get_close_matches(wrong, list(known), n=most, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
