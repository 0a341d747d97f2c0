"""Calls listeners with the events of a run as they are recorded. A failing listener does not end the run."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, EventReader, ListenerFailed

Listen: TypeAlias = Callable[[list[Event]], None]
"""A callable that gets new events in order, and at intervals an empty list. If it has a method `close`, that is called
after the last events."""

QUIET_SECONDS = 0.5
"""Interval of the calls without events."""


class Broadcast:
    """Passes events recorded since its creation to listeners, including those that other processes record."""

    def __init__(self, run: RunDirectory, listeners: Sequence[Listen]) -> None:
        self._run = run
        self._listeners = list(listeners)
        self._reader = EventReader(run.stream.path, from_end=True)
        self._notified = -QUIET_SECONDS

    def notify(self, also: Sequence[Event] = ()) -> None:
        """Pass new events to the listeners, or at intervals an empty list, so that displays refresh. A listener that
        fails is dropped and the failure recorded.

        Args:
            also: events that are not recorded because they repeat recorded ones.
        """
        events = [*also, *self._reader.news()]
        if events or time.monotonic() - self._notified >= QUIET_SECONDS:
            self._notify(events)

    def _notify(self, events: list[Event]) -> None:
        self._notified = time.monotonic()
        for listen in list(self._listeners):
            self._call(listen, functools.partial(listen, events))

    def close(self) -> None:
        """Pass the last events to the listeners and close those that have a method `close`."""
        self._notify(self._reader.news())
        closing = [(listen, close) for listen in self._listeners if (close := getattr(listen, "close", None))]
        for listen, close in closing:
            self._call(listen, close)
        self._listeners = [listen for listen in self._listeners if not hasattr(listen, "close")]
        self._notify(self._reader.news())  # events recorded meanwhile, for the others

    def _call(self, listen: Listen, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._listeners.remove(listen)
            name = getattr(listen, "__qualname__", type(listen).__qualname__)
            failure = ListenerFailed(listener=name, error=f"{type(error).__name__}: {error}")
            with contextlib.suppress(OSError):  # a full disk ends the run with its own error message
                self._run.record(failure)
