"""The worker process that runs a user's scoring function, which may exit, crash or hang without affecting the stage.

It reads JSON lines from a socket: first the function to load, then batches of samples. It replies with one line per
sample, immediately, so that the stage always knows which sample is being scored. A function that takes several answers
at once is given the whole batch of a line; if such a call fails, all its answers fail.
"""

import asyncio
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
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

import msgspec

from annotation.workers.coroutines import dump_coroutines
from contracts.callables import load_callable, place_of
from contracts.errors import UserError
from contracts.processes import die_with_parent
from contracts.stopping import SIGNALS

KEYWORDS = ("messages", "response", "finish_reason", "answer")
"""Keyword arguments of every function that scores one answer."""
OPTIONAL_KEYWORDS = ("tags", "tools", "inputs", "response_ids")
"""Keyword arguments that are passed only if the function has parameters of these names."""
BATCH = "samples"
"""Name of the parameter that makes a function a batched one."""
SCORE = "score"
RETURN_SECONDS = 0.25
"""Samples of a batch that are not started within this time are returned, for other workers to score."""
MAX_BYTES = 1 << 16
"""Maximum size of the further results that are stored with a score, in bytes of JSON."""


class RuleTask(msgspec.Struct):
    """The first line that a worker reads: the function to load, and its settings."""

    path: str
    inputs: list[str] | None
    parent: int
    settings: dict[str, Any] = {}
    instantiates: bool = True
    """Whether a class is instantiated, or only its signature checked."""


class Ready(msgspec.Struct, array_like=True, tag=True):
    """The first line that a worker sends: the function is loaded."""

    is_batched: bool
    """Whether it scores several responses per call."""
    closes: bool
    """Whether it has a `close()`, to be called when it is dropped."""


class Failed(msgspec.Struct, array_like=True, tag=True):
    """Why a sample has no score: the message before and after the sample's name."""

    before: str
    after: str


class TokenRewards(msgspec.Struct, array_like=True, tag=True):
    """A reward for each response token."""

    rewards: list[float]


class DetailedScore(msgspec.Struct, array_like=True, tag="Told"):  # the tag in journals of earlier versions
    """A score with the further results that were returned with it."""

    score: float | TokenRewards
    parts: dict[str, float]
    extras: dict[str, Any]


class AnswerInput(msgspec.Struct, array_like=True):
    """An answer, as passed to a batched function."""

    messages: list[dict[str, Any]]
    response: str
    finish_reason: str
    answer: str | None
    tags: list[str]
    tools: list[dict[str, Any]] | None
    response_ids: list[int]
    prompt_id: str
    sample: int


WorkerReply = float | TokenRewards | DetailedScore | None | bool | Failed
"""A line that a worker sends: a score; None: the function cannot score the sample; True: the remaining samples are
returned."""


def main(descriptor: int) -> NoReturn:
    """Score samples from the socket until it is closed."""
    me = os.getpid()
    os.set_inheritable(descriptor, False)
    connection = socket.socket(fileno=descriptor)
    lines = connection.makefile("rb")
    task = msgspec.json.decode(lines.readline(), type=RuleTask)
    die_with_parent(task.parent)
    _set_up_process()
    encoder = msgspec.json.Encoder()

    def send(*answers: WorkerReply | Ready) -> None:
        if os.getpid() != me:  # the function forked, and the child returned
            os._exit(1)
        connection.sendall(b"".join(encoder.encode(answer) + b"\n" for answer in answers))

    try:
        function = _load(task)
    except BaseException as error:
        send(Failed(_import_failure(task.path, error), ""))
        sys.exit(0)
    interrupts = _Interrupts(install=function.closes)
    with contextlib.suppress(OSError, KeyboardInterrupt):  # the stage has dropped this scorer, perhaps during a call
        send(Ready(function.is_batched, function.closes))
        _serve(function, lines, send, interrupts)
    function.close(task.path)
    sys.exit(0)


def _serve(function: "LoadedFunction", lines: BinaryIO, send: Callable[..., None], interrupts: "_Interrupts") -> None:
    """Score the samples of each line, until the stage closes the connection or interrupts a call."""
    decoder = msgspec.json.Decoder(list[AnswerInput])
    for line in lines:
        given = decoder.decode(line)
        with interrupts.allowed():
            _score_line(function, given, send)


def _score_line(function: "LoadedFunction", given: list[AnswerInput], send: Callable[..., None]) -> None:
    if function.is_batched:
        send(*_score_batch(function, given))
        return
    began = time.monotonic()
    for one in given:
        if time.monotonic() - began > RETURN_SECONDS:
            send(True)
            break
        send(_score_one(function, one))


class _Interrupts:
    """Handles SIGINT, with which the stage interrupts the call in progress when it drops a scorer with a `close()`.

    Outside of calls it only prevents the next one, so that `close()` itself is never interrupted.
    """

    def __init__(self, *, install: bool) -> None:
        self.install = install
        self.dropped = False
        if install:
            signal.signal(signal.SIGINT, self._prevent_next)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let SIGINT raise KeyboardInterrupt inside; asyncio cancels the calls in progress."""
        if not self.install:
            yield
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            if self.dropped:
                raise KeyboardInterrupt
            yield
        finally:
            signal.signal(signal.SIGINT, self._prevent_next)

    def _prevent_next(self, number: int, frame: FrameType | None) -> None:
        self.dropped = True


def _set_up_process() -> None:
    """Set up signals and output for the user's function.

    A preemption signal goes to all processes of a job. The worker ignores it, since the stage handles it, and may
    finish its current work first.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)
    os.register_at_fork(after_in_child=_restore_signals)
    faulthandler.enable()
    signal.signal(signal.SIGQUIT, dump_coroutines)
    faulthandler.register(signal.SIGQUIT, all_threads=True, chain=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the function's output goes to the log, and must not fail
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def _restore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@dataclass
class LoadedFunction:
    """A loaded function, and how to call it."""

    function: Callable[..., Any]
    is_async: bool
    takes_batch: bool
    """Whether one call takes a whole batch."""
    named: frozenset[str]
    """The keywords of `OPTIONAL_KEYWORDS` that it takes."""
    further: dict[str, Any]
    """Further keyword arguments of every call."""
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    instance: Any = None
    """The instance, if the path names a class."""

    @property
    def closes(self) -> bool:
        """Whether the instance has a `close()`."""
        return callable(getattr(self.instance, "close", None))

    def close(self, path: str) -> None:
        """Call `close()` of the instance, if it has one; an exception in it is logged."""
        if not self.closes:
            return
        try:
            result = self.instance.close()
            if inspect.isawaitable(result):
                self.run(_awaited(result))
        except BaseException as error:
            problem = f"{type(error).__name__}: {_text(error)}{place_of(error)}"
            print(f"class {path!r}: close() failed: {problem}. Its scores are kept.", file=sys.stderr, flush=True)

    @property
    def is_batched(self) -> bool:
        """Whether it is given a whole batch: in one call, or in concurrent calls if it is async."""
        return self.takes_batch or self.is_async

    def keywords(self, one: AnswerInput) -> dict[str, Any]:
        """The keyword arguments of a call with one answer."""
        names = [*KEYWORDS, *(name for name in OPTIONAL_KEYWORDS if name in self.named and name not in self.further)]
        return {name: getattr(one, name) for name in names} | self.further


def _load(task: RuleTask) -> LoadedFunction:
    """Load the function, or load the class and instantiate it with its settings.

    Raises:
        UserError: it cannot be imported, or its signature does not fit.
    """
    target = load_callable(task.path)
    run = asyncio.Runner().run
    inputs = {} if task.inputs is None else {"inputs": [Path(path) for path in task.inputs]}
    if not inspect.isclass(target):
        return _inspect_function(
            task, f"function {task.path!r}", target, _signature(target), task.settings, inputs, run
        )
    what = f"class {task.path!r}"
    method = next((vars(base)["__call__"] for base in target.__mro__ if "__call__" in vars(base)), None)
    if method is None:
        raise UserError(f"{what} cannot be called: give it a method __call__(self, samples), which returns a list.")
    signature = _signature(target)
    takes_inputs = signature is not None and "inputs" in signature.parameters
    given = {**task.settings, **(inputs if takes_inputs else {})}
    _require_fits(task, what, signature, given, "instantiated with the settings")
    called = _signature(method)
    if called is not None:
        called = called.replace(parameters=list(called.parameters.values())[1:])
    found = _inspect_function(task, f"{what}.__call__", method, called, {}, inputs, run)
    if task.instantiates:
        try:
            instance: Any = target(**given)
        except UserError:
            raise
        except Exception as error:
            text = f"{what} failed when it was instantiated: {type(error).__name__}: {_text(error)}{place_of(error)}."
            raise UserError(text) from error
        found.function = found.instance = instance
    return found


async def _awaited(result: Awaitable[Any]) -> None:
    await result


def _inspect_function(
    task: RuleTask,
    what: str,
    function: Callable[..., Any],
    signature: inspect.Signature | None,
    settings: dict[str, Any],
    inputs: dict[str, Any],
    run: Callable[[Coroutine[Any, Any, Any]], Any],
) -> LoadedFunction:
    if inspect.isasyncgenfunction(function):
        raise UserError(f"{what} is an async generator; return its results instead.")
    method = inspect.getattr_static(type(function), "__call__", None)  # `function` may be a callable object
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(method)
    if signature is None:  # functions written in C may have none
        return LoadedFunction(function, is_async, False, frozenset(), settings, run)
    names = signature.parameters
    takes_batch = BATCH in names
    named = frozenset(name for name in OPTIONAL_KEYWORDS if name in names and (not takes_batch or name == "inputs"))
    if "inputs" in named and not inputs:
        if names["inputs"].default is inspect.Parameter.empty:
            raise UserError(f"{what} takes inputs, but its scorer sets none. Set inputs=[PATH, ...] to what it reads.")
        named -= {"inputs"}
    given = [BATCH] if takes_batch else list(KEYWORDS)
    keywords = dict.fromkeys([*given, *named]) | settings
    if taken := sorted(settings.keys() & {BATCH, *KEYWORDS, *OPTIONAL_KEYWORDS}):
        raise UserError(f"{what}: settings has {taken[0]!r}, which every call is given. Choose another name.")
    _require_fits(task, what, signature, keywords, "called with the keywords")
    further = settings | (inputs if "inputs" in named else {})
    return LoadedFunction(function, is_async, takes_batch, named, further, run)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):  # functions written in C may have none
        return None


def _require_fits(
    task: RuleTask, what: str, signature: inspect.Signature | None, keywords: dict[str, Any], how: str
) -> None:
    try:
        if signature is not None:
            signature.bind(**keywords)
    except TypeError as error:
        name = task.path.rpartition(":")[2]
        advice = (
            f"Write def {name}(*, {', '.join(KEYWORDS)}), or def {name}(*, response, **others), or for many answers at "
            f"once def {name}({BATCH})."
            if how.startswith("called")
            else "Write these into settings: {...} of the scorer, or give the parameters defaults."
        )
        raise UserError(
            f"{what} takes {signature}, but is {how} {', '.join(keywords) or '(none)'}: {error}. {advice}"
        ) from error


def _import_failure(path: str, error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    return (
        f"function {path!r} cannot be imported: its module raised {type(error).__name__}: {_text(error)}"
        f"{place_of(error)}. Remove what ends the process when the file is imported."
    )


def _score_one(loaded: LoadedFunction, one: AnswerInput) -> WorkerReply:
    try:
        return convert_result(loaded.function(**loaded.keywords(one)), one, tokens="response_ids" in loaded.named)
    except BaseException as error:
        return _failure(error, "")


def _score_batch(loaded: LoadedFunction, given: list[AnswerInput]) -> list[WorkerReply]:
    """The results of a batch that is scored together."""
    batch_text = f"a batch of {len(given)} answers with "
    try:
        if not loaded.takes_batch:
            found: Any = loaded.run(_all_calls(loaded, given))
            return [_reply_of(loaded, one, value) for one, value in zip(given, found, strict=True)]
        found = loaded.function(**{BATCH: given}, **loaded.further)
        if loaded.is_async:
            found = loaded.run(found)
    except BaseException as error:
        return [_failure(error, batch_text)] * len(given)
    if hasattr(found, "tolist"):  # a NumPy array or a tensor
        found = found.tolist()
    if not isinstance(found, list | tuple):
        return [
            Failed(f"returned {found!a:.80} for {batch_text[:-1]}", "; return a list with one result for each.")
        ] * len(given)
    if len(found) != len(given):
        wrong = Failed(f"returned {len(found)} results for {batch_text[:-1]}", "; return one for each, in their order.")
        return [wrong] * len(given)
    return [_reply_of(loaded, one, value) for one, value in zip(given, found, strict=True)]


async def _all_calls(loaded: LoadedFunction, given: list[AnswerInput]) -> list[Any]:
    calls = [loaded.function(**loaded.keywords(one)) for one in given]
    return await asyncio.gather(*calls, return_exceptions=True)


def _reply_of(loaded: LoadedFunction, one: AnswerInput, value: Any) -> WorkerReply:
    if isinstance(value, BaseException):
        return _failure(value, "")
    try:
        return convert_result(value, one, tokens=loaded.takes_batch or "response_ids" in loaded.named)
    except BaseException as error:
        return _failure(error, "")


def _failure(error: BaseException, batch_text: str) -> Failed:
    if isinstance(error, OverflowError) and not batch_text:
        return Failed("gave a number too large for a float for", f": {error}.")
    # A UserError of a built-in kind is about its inputs, so its place in the code is not shown.
    text = _text(error) if isinstance(error, UserError) else f"{type(error).__name__}: {_text(error)}{place_of(error)}."
    return Failed(f"failed on {batch_text}".rstrip(), f": {text}")


def convert_result(value: Any, one: AnswerInput, *, tokens: bool) -> WorkerReply:
    """Check and convert a function's return value for an answer. With `tokens` it may be a list of token rewards."""
    if value is None:
        return None
    value = _plain(value)
    if isinstance(value, Mapping):
        return _detailed(value, one, tokens=tokens)
    if isinstance(value, Real):
        score = float(value)
        return score if math.isfinite(score) else Failed(f"gave {score} for", ". A score must be a finite number.")
    if isinstance(value, list | tuple) and tokens:
        return _token_rewards(value, len(one.response_ids))
    if inspect.isawaitable(value):
        with contextlib.suppress(Exception):
            value.close()  # type: ignore[attr-defined]
        return Failed("returned an awaitable for", "; write async def, or a plain def with asyncio.run(...) inside.")
    return Failed(f"returned {value!a} for", "; return a number, or None if it cannot score the answer.")


def _detailed(value: Mapping[Any, Any], one: AnswerInput, *, tokens: bool) -> WorkerReply:
    """Convert a returned mapping: numbers besides the score become parts, all other values extras."""
    if SCORE not in value:
        return Failed(
            f"returned a mapping without {SCORE!r} for", f"; it has {', '.join(map(repr, value)) or 'nothing'}."
        )
    score = convert_result(value[SCORE], one, tokens=tokens) if not isinstance(value[SCORE], Mapping) else True
    if score is None or isinstance(score, Failed):
        return score
    if isinstance(score, bool | DetailedScore):
        return Failed("returned a mapping as score for", "; return a number, or None if it cannot score the answer.")
    parts: dict[str, float] = {}
    extras: dict[str, Any] = {}
    for name, given in value.items():
        if name == SCORE or given is None:
            continue
        if not isinstance(name, str) or not name.isidentifier() or len(name) > 50:
            return Failed(f"returned a value named {name!a:.80} for", "; names are letters, digits and _, 50 at most.")
        item = _plain(given)
        if isinstance(item, Real):
            parts[name] = float(item)
            if not math.isfinite(parts[name]):
                return Failed(f"gave {parts[name]} as {name} for", ". Numbers must be finite.")
        else:
            extras[name] = item
    try:
        size = len(msgspec.json.encode(extras))
    except (TypeError, ValueError, RecursionError) as error:
        return Failed("returned what cannot be written as JSON for", f": {_text(error)}.")
    if size > MAX_BYTES:
        return Failed(f"returned {size} bytes of further results for", f"; at most {MAX_BYTES} are stored per answer.")
    return DetailedScore(score, parts, extras)


def _token_rewards(values: Sequence[Any], tokens: int) -> WorkerReply:
    if len(values) != tokens:
        return Failed(f"returned {len(values)} numbers for", f", which has {tokens} response_ids; return one for each.")
    values = [_plain(value) for value in values]
    if not all(isinstance(value, Real) and math.isfinite(value) for value in values):
        return Failed("returned a list for", " that holds something else than finite numbers.")
    return TokenRewards([float(value) for value in values])


def _plain(value: Any) -> Any:
    """The number in a zero-dimensional array, which NumPy and torch return for a sum or a mean; other values as they
    are."""
    if isinstance(value, Real) or getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    number = value.item()
    return number if isinstance(number, Real) else value


def _text(error: BaseException) -> str:
    try:
        return str(error).encode(errors="backslashreplace").decode()  # JSON cannot encode lone surrogates
    except BaseException:
        return "(its message cannot be shown)"
