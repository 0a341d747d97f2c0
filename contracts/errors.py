"""The two ways to fail: by the user's mistake, and otherwise."""

import errno


class UserError(Exception):
    """A mistake that the user can mend: one message naming the thing, the value and the mend; exit code 2.

    Every other exception is a defect or an accident of the machine, keeps its traceback and exits with 1.
    """

    exit_code = 2


def as_user_error(error: Exception) -> UserError | None:
    """The same as a mistake of the user's, if it is one that the operating system found: a full disk."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return UserError(
            f"the disk is full{where} ({error.strerror}). Free some space; the same command continues, and what has "
            "been published is kept."
        )
    return None
