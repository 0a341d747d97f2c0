"""The two ways to fail: by the user's mistake, and otherwise."""


class UserError(Exception):
    """A mistake that the user can mend: one message naming the thing, the value and the mend; exit code 2.

    Every other exception is a defect or an accident of the machine, keeps its traceback and exits with 1.
    """

    exit_code = 2
