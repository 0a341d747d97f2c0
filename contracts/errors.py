"""The two ways to fail: by the user's mistake, and otherwise."""

import errno
import os
import re

from contracts.limits import limit_behind

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
    """A mistake that the user can mend: one message naming the thing, the value and the mend; exit code 2.

    Every other exception is a defect or an accident of the machine, keeps its traceback and exits with 1.
    """

    exit_code = 2


class TransientError(Exception):
    """An accident that the same command may well not meet in a minute, told in one message; exit code 1."""


def as_user_error(error: Exception) -> UserError | None:
    """The same as a mistake of the user's, if it is one: a full disk, or a path that cannot be used."""
    if isinstance(error, UserError):
        return error
    if limit := limit_behind(error):
        return UserError(limit)
    code, path = system_code(error), getattr(error, "filename", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({path})" if path else ""
        return UserError(
            f"the disk is full{where}: {os.strerror(code)}. Free some space; the same command continues, and what has "
            "been published is kept."
        )
    if code in UNUSABLE_PATH and path:
        return UserError(f"{path}: {os.strerror(code)}. Choose another path, or change its permissions.")
    return None


def system_code(error: BaseException) -> int | None:
    """The operating system's code of an error; libraries written in Rust (safetensors, tokenizers) only write it."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def is_transient(error: BaseException) -> bool:
    """Whether the same thing may well succeed in a minute: a lost connection, device, peer or file server."""
    if isinstance(error, TransientError | ConnectionError | TimeoutError):
        return True
    if system_code(error) in TRANSIENT_CODES:
        return True
    return any(kind.__name__ in TRANSIENT_NAMES for kind in type(error).__mro__)
