"""Stops a stage on request: it finishes its current shard or step if the grace period allows that, and exits.

SIGTERM comes from a person, a driver or a scheduler; SIGUSR1 and SIGUSR2 come from schedulers some time before they
take a machine away; SIGINT and SIGHUP come from the terminal of a stage that was started by hand. However the stage
ends, finished shards and the last saved step are kept.
"""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import NoReturn

GRACE = "RATCHET_GRACE_SECONDS"
"""Environment variable: seconds that a stage which was asked to stop may spend on finishing its current work."""
DEFAULT_GRACE = 20.0
MESSAGE = "was asked to stop, and did; what it had finished is kept, and the same command continues"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""Signals that a terminal sends to all processes started in it; under `nohup`, or a shell's `&`, they are ignored."""


class Stopped(SystemExit):
    """Ends a stage that was asked to stop; its code is 128 + the signal's number, as in a shell."""


_requested: signal.Signals | None = None
_deferred = 0


def grace_seconds() -> float:
    """The grace period of this process."""
    return float(os.environ.get(GRACE, DEFAULT_GRACE))


def listen() -> None:
    """Install handlers for the signals that request a stop."""
    for number in SIGNALS:
        signal.signal(number, _answer)
    for number in not_ignored(TERMINAL):
        signal.signal(number, _answer)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Handle stop signals inside the block only, for commands that may also be called from Python."""
    global _requested
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *TERMINAL)}
    listen()
    try:
        yield
    finally:
        _requested = None
        for number, handler in before.items():
            signal.signal(number, handler)


def not_ignored(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """The signals that this process has not inherited as ignored."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def ignore() -> None:
    """Ignore further stop requests, because the process is exiting already and has to report why."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (*SIGNALS, *TERMINAL):  # not SIG_IGN: Python would print a traceback for a signal that just arrived
        signal.signal(number, lambda number, frame: None)


def requested() -> signal.Signals | None:
    """The signal by which a stop was requested, or None; for use inside `deferred`."""
    return _requested


def as_stop(error: BaseException) -> BaseException:
    """The reason why a process ends, given the error that ends it.

    Ctrl-C and SIGHUP also reach its children, so after them any `error` may be a consequence: the reason is then the
    requested stop. Otherwise it is `error` itself.
    """
    if isinstance(error, KeyboardInterrupt):
        return Stopped(128 + signal.SIGINT)
    if _requested in TERMINAL and not isinstance(error, Stopped):
        return Stopped(128 + _requested)
    return error


def leave() -> NoReturn:
    """End the stage; everything worth keeping must be on the disk."""
    raise Stopped(128 + int(_requested or signal.SIGTERM))


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Delay a stop that is requested inside until the end of the block, but no longer than the grace period."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    if requested() and not _deferred:
        leave()


def _answer(number: int, frame: FrameType | None) -> None:
    global _requested
    again = _requested is not None and number == signal.SIGINT  # the user does not want to wait
    _requested = _requested or signal.Signals(number)
    if again or not _deferred:
        leave()
    if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
        signal.signal(signal.SIGALRM, _give_up)
        signal.setitimer(signal.ITIMER_REAL, max(grace_seconds(), 0.001))


def _give_up(number: int, frame: FrameType | None) -> None:
    leave()
