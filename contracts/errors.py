"""The two ways to fail: by the user's mistake, and otherwise."""

import errno

UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


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
