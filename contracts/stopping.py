"""A stage that is asked to stop: it saves what it has in hand, if it can do so in its grace period, and leaves.

SIGTERM comes from a person, a driver or a scheduler; SIGUSR1 and SIGUSR2 are what schedulers send some time before they
take a machine away; SIGINT and SIGHUP come from the terminal of a stage that was started by hand. Nothing is lost
whichever way it ends: a finished shard stays, and so does the last saved step.
"""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import NoReturn

GRACE = "RATCHET_GRACE_SECONDS"
"""Environment variable: how long a stage that was asked to stop may go on with what it has in hand."""
DEFAULT_GRACE = 20.0
MESSAGE = "was asked to stop, and did; what it had finished is kept, and the same command continues"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""What a terminal sends to everything that was started in it; `nohup`, or a shell's `&`, has it ignored."""


class Stopped(SystemExit):
    """The end of a stage that was asked to stop; its code is 128 + the signal's number, as in a shell."""


_requested: signal.Signals | None = None
_deferred = 0


def grace_seconds() -> float:
    """The grace period of this process."""
    return float(os.environ.get(GRACE, DEFAULT_GRACE))


def listen() -> None:
    """From now on, answer the signals that ask for a stop."""
    for number in SIGNALS:
        signal.signal(number, _answer)
    for number in heeded(TERMINAL):
        signal.signal(number, _answer)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Answer those signals inside, and nowhere else: for commands that others may call from Python."""
    global _requested
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *TERMINAL)}
    listen()
    try:
        yield
    finally:
        _requested = None
        for number, handler in before.items():
            signal.signal(number, handler)


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those signals that whoever started this process has not had ignored."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def ignore() -> None:
    """From now on, answer no request: the process is leaving already, and has to say why."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (*SIGNALS, *TERMINAL):  # not SIG_IGN: of a signal that has just come, Python would print a traceback
        signal.signal(number, lambda number, frame: None)


def requested() -> bool:
    """Whether a stop was asked for; to be looked at inside `deferred`."""
    return _requested is not None


def explained(error: BaseException) -> BaseException:
    """What a process ends by; after Ctrl-C, which has ended its children as well, that is the stop."""
    if isinstance(error, KeyboardInterrupt):
        return Stopped(128 + signal.SIGINT)
    if _requested in TERMINAL and not isinstance(error, Stopped):
        return Stopped(128 + _requested)
    return error


def leave() -> NoReturn:
    """End the stage: everything worth keeping is on the disk."""
    raise Stopped(128 + int(_requested or signal.SIGTERM))


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A request that comes inside waits for the block's end, but no longer than the grace period."""
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
    again = _requested is not None and number == signal.SIGINT  # somebody at a terminal does not want to wait
    _requested = _requested or signal.Signals(number)
    if again or not _deferred:
        leave()
    if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
        signal.signal(signal.SIGALRM, _give_up)
        signal.setitimer(signal.ITIMER_REAL, max(grace_seconds(), 0.001))


def _give_up(number: int, frame: FrameType | None) -> None:
    leave()
