"""The two ways to fail: by the user's mistake, and otherwise."""

import errno

UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


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


def as_user_error(error: Exception) -> UserError | None:
    """The same as a mistake of the user's, if it is one: a full disk, or a path that cannot be used."""
    if isinstance(error, UserError):
        return error
    if not isinstance(error, OSError):
        return None
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full{where}: {error.strerror}. Free some space; the same command continues, and what has "
            "been published is kept."
        )
    if error.errno in UNUSABLE_PATH and error.filename:
        return UserError(f"{error.filename}: {error.strerror}. Choose another path, or change its permissions.")
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same thing may well succeed in a minute: a lost connection, device, peer or file server."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_CODES:
        return True
    return any(kind.__name__ in TRANSIENT_NAMES for kind in type(error).__mro__)
