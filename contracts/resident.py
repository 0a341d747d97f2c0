"""What a process keeps from one stage to the next: an engine, a model.

Only a warm process (contracts/warm.py) keeps anything; in every other one `hold` opens what it is asked for. Nothing
that is kept decides what a stage publishes: the next stage is given it only where it would open the same, or where it
can be updated to the same and this is proven.
"""

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from contracts.attempt import ATTEMPT
from contracts.errors import UserError

T = TypeVar("T")

Start: TypeAlias = Literal["loaded", "updated", "kept"]
"""How a stage came to its engine or model: loaded it, updated the weights of one that was there, or found it ready."""


@dataclass
class _Resident:
    like: str
    content: str
    value: Any
    close: Callable[[Any], None]


_residents: dict[str, _Resident] = {}
_allowed = False


def allow() -> None:
    """From now on this process keeps what its stages open."""
    global _allowed
    _allowed = True


def any_held() -> bool:
    """Whether it keeps anything, so that it is worth to be given another stage."""
    return bool(_residents)


def hold(
    name: str,
    *,
    like: str,
    content: str,
    open_: Callable[[], T],
    close: Callable[[T], None] = lambda value: None,
    update: Callable[[T], None] | None = None,
    begin: Callable[[T], None] = lambda value: None,
) -> tuple[T, Start]:
    """What this process keeps under a name, where it fits, or else a new one, which is kept from now on.

    Args:
        like: all that an update cannot change, as one string.
        content: the rest, for example the fingerprint of the weights.
        open_: makes a new one.
        close: ends one for which there is no use any more.
        update: gives one that is alike the wanted content, and raises where it cannot prove that it did. Then, and
            after any other error of its own, a new one is made.
        begin: makes one that was there ready for another stage, and raises where it does not work any more.

    Raises:
        UserError: by `update`, of what would be wrong with a new one, too.
    """
    found = _residents.pop(name, None)
    if found is not None and found.like == like:
        how: Start | None = "kept" if found.content == content else None
        try:
            if how is None and update is not None:
                update(found.value)
                how = "updated"
            if how is not None:
                begin(found.value)
                _residents[name] = _Resident(like, content, found.value, close)
                return found.value, how
        except UserError:
            raise
        except Exception:
            print(f"the {name} could not be {how or 'updated'} and is loaded anew:", file=sys.stderr)
            traceback.print_exc()
    if found is not None:
        found.close(found.value)
        del found
        gc.collect()
    value = open_()
    if _allowed:
        _residents[name] = _Resident(like, content, value, close)
    return value, "loaded"


def closes() -> bool:
    """Whether a stage has to close what it has opened when it ends, because nobody keeps it."""
    return not _allowed


@contextlib.contextmanager
def outlasting() -> Iterator[None]:
    """What is started inside stays as long as this process, though the attempt ends: it is not marked as a part of it.

    A supervisor ends all that carries the mark (`contracts.processes.end_marked`).
    """
    mark = os.environ.pop(ATTEMPT, None) if _allowed else None
    try:
        yield
    finally:
        if mark is not None:
            os.environ[ATTEMPT] = mark
