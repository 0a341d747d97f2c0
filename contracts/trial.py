"""Looks at a function of the user's before anything runs: it is imported, and its signature compared with its call.

In a process of its own: what a module does when it is imported may hang, or end the process.
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
"""How long a function may take to be imported until it is no longer waited for."""


class Call(msgspec.Struct, frozen=True):
    """How a function is going to be called."""

    function: str
    """`package.module:function` or `file.py:function`."""
    given: tuple[str, ...]
    """Names of what it is given in order."""
    keywords: tuple[str, ...]
    """Names of its settings."""

    @property
    def shown(self) -> str:
        """As it would be written: name(given, keyword=...)."""
        name = self.function.rpartition(":")[2]
        return f"{name}({', '.join([*self.given, *(f'{keyword}=...' for keyword in self.keywords)])})"


def mistake_in(call: Call, seconds: float = IMPORT_SECONDS) -> str | None:
    """What is wrong with a call; None where nothing is, or where the function was not imported after `seconds`: then
    nobody knows yet, and it may have much to load."""
    try:
        source_file(call.function)
    except UserError as error:
        return str(error)
    # As this process finds its modules, wherever it was started: a user's files may be named like libraries.
    code = f"import sys; sys.path[:] = {sys.path!r}; from contracts.trial import main; main()"
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
    """Answer about the call on stdin, in the last line of stdout; what the module prints goes to stderr."""
    call = msgspec.json.decode(sys.stdin.buffer.read(), type=Call)
    with contextlib.redirect_stdout(sys.stderr):
        found = _mistake(call)
    with contextlib.suppress(BrokenPipeError):  # whoever has asked was killed
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
