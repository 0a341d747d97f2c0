"""The worker process that runs a user's scoring function, which may exit, crash or hang without affecting the stage.

It reads JSON lines from a socket: first the function to load, then batches of samples. It answers with one line per
sample, immediately, so that the stage always knows which sample is being judged.
"""

import contextlib
import faulthandler
import inspect
import io
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from contracts.callables import load_callable
from contracts.errors import UserError
from contracts.processes import die_with_parent
from contracts.stopping import SIGNALS

GIVEN = ("messages", "response", "finish_reason", "answer")
"""The keyword arguments of every function."""
IF_NAMED = ("tags", "tools", "inputs", "response_ids")
"""Keyword arguments that are passed only if the function has parameters of these names."""
HAND_BACK_SECONDS = 0.25
"""Samples of a batch that are not started within this time are returned, for other workers to judge."""


class RuleTask(msgspec.Struct):
    """The first line: the function to load."""

    path: str
    inputs: list[str] | None
    parent: int


class Failed(msgspec.Struct, array_like=True, tag=True):
    """Why a sample has no judgement: the text before and after the sample's name."""

    before: str
    after: str


class TokenRewards(msgspec.Struct, array_like=True, tag=True):
    """A reward for each response token."""

    rewards: list[float]


Request = tuple[list[dict[str, Any]], str, str, str | None, list[str], list[dict[str, Any]] | None, list[int]]
"""A sample: messages, response, finish_reason, answer, tags, tools, response_ids."""
Answer = float | TokenRewards | None | bool | Failed
"""A judgement; None: the function cannot judge the sample; True: the remaining samples are returned."""


def main(descriptor: int) -> NoReturn:
    """Judge samples from the socket until it is closed."""
    me = os.getpid()
    os.set_inheritable(descriptor, False)
    connection = socket.socket(fileno=descriptor)
    lines = connection.makefile("rb")
    task = msgspec.json.decode(lines.readline(), type=RuleTask)
    die_with_parent(task.parent)
    _set_up_process()
    encoder = msgspec.json.Encoder()

    def say(answer: Answer) -> None:
        connection.sendall(encoder.encode(answer) + b"\n")

    try:
        function, extra = _load(task)
    except BaseException as error:
        say(Failed(_import_failure(task.path, error), ""))
        sys.exit(0)
    say(None)
    inputs = [Path(path) for path in task.inputs or ()]
    decoder = msgspec.json.Decoder(list[Request])
    for line in lines:
        began = time.monotonic()
        for messages, response, finish_reason, answer, tags, tools, response_ids in decoder.decode(line):
            if time.monotonic() - began > HAND_BACK_SECONDS:
                say(True)
                break
            given: dict[str, Any] = {}
            if extra:
                known = {"tags": tags, "tools": tools, "inputs": inputs, "response_ids": response_ids}
                given = {name: value for name, value in known.items() if name in extra}
            result = _judge(function, messages, response, finish_reason, answer, given)
            if os.getpid() != me:  # the function forked, and the child returned
                os._exit(1)
            say(result)
    sys.exit(0)


def _set_up_process() -> None:
    """Set up signals and output as a user's function expects them.

    A preemption signal goes to all processes of a job; the stage handles it, and may finish its current work first.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)
    os.register_at_fork(after_in_child=_restore_signals)
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # its output goes to the log and must not fail
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def _restore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _load(task: RuleTask) -> tuple[Callable[..., Any], frozenset[str]]:
    """The function, and which of `IF_NAMED` it takes.

    Raises:
        UserError: it cannot be imported, or its signature does not fit.
    """
    function = load_callable(task.path)
    what = f"function {task.path!r}"
    if any(check(function) for check in (inspect.iscoroutinefunction, inspect.isasyncgenfunction)):
        raise UserError(f"{what} is async; write a plain def, with asyncio.run(...) inside where it has to wait.")
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # functions written in C may have no signature
        return function, frozenset()
    extra = {name for name in IF_NAMED if name in signature.parameters}
    if task.inputs is None and "inputs" in extra:
        if signature.parameters["inputs"].default is inspect.Parameter.empty:
            raise UserError(f"{what} takes inputs, but its scorer names none. Set inputs=[PATH, ...] to what it reads.")
        extra.remove("inputs")
    try:
        signature.bind(**dict.fromkeys([*GIVEN, *extra]))
    except TypeError as error:
        name = task.path.rpartition(":")[2]
        raise UserError(
            f"{what} takes {signature}, but is called with the keywords {', '.join(GIVEN)}: {error}. Write "
            f"def {name}(*, {', '.join(GIVEN)}), or def {name}(*, response, **others)."
        ) from error
    return function, frozenset(extra)


def _import_failure(path: str, error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    return (
        f"function {path!r} cannot be imported: its module raised {type(error).__name__}: {_text(error)}"
        f"{_place(error)} Take out what ends the process when the file is imported."
    )


def _judge(
    function: Callable[..., Any], messages: Any, response: str, finish_reason: str, answer: Any, extra: dict[str, Any]
) -> Answer:
    try:
        value = function(messages=messages, response=response, finish_reason=finish_reason, answer=answer, **extra)
        if value is None:
            return None
        if isinstance(value, Real):
            score = float(value)
            return score if math.isfinite(score) else Failed(f"gave {score} for", ". A score must be a finite number.")
        if isinstance(value, list | tuple) and "response_ids" in extra:
            return _token_rewards(value, len(extra["response_ids"]))
        if inspect.isawaitable(value):
            with contextlib.suppress(Exception):
                value.close()  # type: ignore[attr-defined]
            return Failed("returned an awaitable for", "; write a plain def, with asyncio.run(...) inside.")
        return Failed(f"returned {value!a} for", "; return a number, or None where it cannot judge.")
    except OverflowError as error:
        return Failed("gave a number too large for a float for", f": {error}.")
    except BaseException as error:
        return Failed("failed on", f": {type(error).__name__}: {_text(error)}{_place(error)}")


def _token_rewards(values: Sequence[Any], tokens: int) -> Answer:
    if len(values) != tokens:
        return Failed(f"returned {len(values)} numbers for", f", which has {tokens} response_ids; return one for each.")
    if not all(isinstance(value, Real) and math.isfinite(value) for value in values):
        return Failed("returned a list for", " that holds something else than finite numbers.")
    return TokenRewards([float(value) for value in values])


def _text(error: BaseException) -> str:
    try:
        return str(error).encode(errors="backslashreplace").decode()  # JSON cannot encode lone surrogates
    except BaseException:
        return "(its message cannot be shown)"


def _place(error: BaseException) -> str:
    """The innermost line of the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})." if frames else "."
