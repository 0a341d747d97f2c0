"""Listeners: told what happens in a run, as it is recorded. What they do can fail; the run goes on."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, EventReader, ListenerFailed

Listen: TypeAlias = Callable[[list[Event]], None]
"""Is told at once what has happened in a run, in order, and now and then that nothing has. Where it has a method
`close`, that is called when nothing more will be told."""

QUIET_SECONDS = 0.5
"""How often listeners are told that nothing has happened."""


class Broadcast:
    """Tells listeners what has been recorded since it was made, whoever has recorded it."""

    def __init__(self, run: RunDirectory, listeners: Sequence[Listen]) -> None:
        self._run = run
        self._listeners = list(listeners)
        self._reader = EventReader(run.stream.path, from_end=True)
        self._told = -QUIET_SECONDS

    def tell(self, also: Sequence[Event] = ()) -> None:
        """Tell what is new, and now and then that nothing is: a display renews itself. One that fails is told no more,
        which is recorded.

        Args:
            also: what is not recorded, since the stream knows it already.
        """
        events = [*also, *self._reader.news()]
        if events or time.monotonic() - self._told >= QUIET_SECONDS:
            self._tell(events)

    def _tell(self, events: list[Event]) -> None:
        self._told = time.monotonic()
        for listen in list(self._listeners):
            self._guarded(listen, functools.partial(listen, events))

    def close(self) -> None:
        """Tell what is new for the last time, and let each listener come to its end."""
        self._tell(self._reader.news())
        closing = [(listen, close) for listen in self._listeners if (close := getattr(listen, "close", None))]
        for listen, close in closing:
            self._guarded(listen, close)
        self._listeners = [listen for listen in self._listeners if not hasattr(listen, "close")]
        self._tell(self._reader.news())  # the others, what has happened meanwhile

    def _guarded(self, listen: Listen, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._listeners.remove(listen)
            name = getattr(listen, "__qualname__", type(listen).__qualname__)
            said = ListenerFailed(listener=name, error=f"{type(error).__name__}: {error}")
            with contextlib.suppress(OSError):  # a full disk ends the run by itself, with its own words
                self._run.record(said)
