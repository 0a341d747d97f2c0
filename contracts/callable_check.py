"""Checks a user's function before the run starts: imports it, and compares its signature with how it will be called.

This happens in a process of its own, because importing a module may hang or end the process.
"""

import contextlib
import inspect
import os
import subprocess
import sys

import msgspec

from contracts.callables import load_callable, source_file
from contracts.errors import UserError, as_user_error, did_you_mean

IMPORT_SECONDS = 60.0
"""How long to wait for the import of a function."""


class Call(msgspec.Struct, frozen=True):
    """A function, and the arguments with which it will be called."""

    function: str
    """`package.module:function` or `file.py:function`."""
    given: tuple[str, ...]
    """Names of the positional arguments."""
    keywords: tuple[str, ...]
    """Names of the keyword arguments, which are the function's settings."""

    @property
    def shown(self) -> str:
        """The call as source code: name(given, keyword=...)."""
        name = self.function.rpartition(":")[2]
        return f"{name}({', '.join([*self.given, *(f'{keyword}=...' for keyword in self.keywords)])})"


def mistake_in(call: Call, seconds: float = IMPORT_SECONDS) -> str | None:
    """Describe what is wrong with a call; None if nothing is, or if the import takes longer than `seconds`, because the
    module may just have much to load."""
    try:
        source_file(call.function)
    except UserError as error:
        return str(error)
    # With the module search path of this process, because a user's files may be named like libraries.
    code = f"import sys; sys.path[:] = {sys.path!r}; from contracts.callable_check import main; main()"
    try:
        result = subprocess.run(
            [sys.executable, "-c", code],
            input=msgspec.json.encode(call),
            stdout=subprocess.PIPE,
            timeout=seconds,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if result.returncode or not result.stdout:
        return (
            f"function {call.function!r} ended the process that imports it (exit code {result.returncode}). Take out "
            "what ends the process when the file is imported."
        )
    return msgspec.json.decode(result.stdout.splitlines()[-1], type=str | None)


def main() -> None:
    """Check the call on stdin, and write the answer as the last line of stdout; output of the module goes to stderr."""
    call = msgspec.json.decode(sys.stdin.buffer.read(), type=Call)
    with contextlib.redirect_stdout(sys.stderr):
        found = _mistake(call)
    with contextlib.suppress(BrokenPipeError):  # the parent was killed
        os.write(sys.stdout.fileno(), msgspec.json.encode(found) + b"\n")


def _mistake(call: Call) -> str | None:
    try:
        function = load_callable(call.function)
    except Exception as error:
        return str(as_user_error(error) or f"function {call.function!r}: {type(error).__name__}: {error}")
    what = f"function {call.function!r}"
    if any(check(function) for check in (inspect.iscoroutinefunction, inspect.isasyncgenfunction)):
        return f"{what} is async; write a plain def, with asyncio.run(...) inside where it has to wait."
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # functions written in C may have no signature
        return None
    try:
        signature.bind(*call.given, **dict.fromkeys(call.keywords))
    except TypeError as error:
        unknown = next((name for name in call.keywords if name not in signature.parameters), "")
        hint = did_you_mean(unknown, signature.parameters)
        return f"{what} takes {signature}, but is called as {call.shown}: {error}.{hint}"
    return None
