"""Keeps an engine or a model in memory from one stage to the next.

Only a forked process (contracts/warm.py) keeps anything; in all others, `hold` always opens a new object. Reuse never
affects what a stage publishes: a stage gets a kept object only if it would open an identical one, or if the object can
be updated to be identical, which is verified.
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
"""How a stage got its engine or model: loaded it, updated the weights of a kept one, or reused a kept one unchanged."""


@dataclass
class _Resident:
    fixed: str
    content: str
    value: Any
    close: Callable[[Any], None]


_residents: dict[str, _Resident] = {}
_allowed = False


def allow() -> None:
    """Let this process keep, from now on, what its stages open."""
    global _allowed
    _allowed = True


def any_held() -> bool:
    """Whether this process keeps anything, so that it is worth running another stage in it."""
    return bool(_residents)


def hold(
    name: str,
    *,
    fixed: str,
    content: str,
    open_: Callable[[], T],
    close: Callable[[T], None] = lambda value: None,
    update: Callable[[T], None] | None = None,
    begin: Callable[[T], None] = lambda value: None,
) -> tuple[T, Start]:
    """Return the object that this process keeps under `name` if it matches, else open a new one and keep that.

    Args:
        fixed: identifies everything that an update cannot change.
        content: identifies the rest, for example by the fingerprint of the weights.
        open_: opens a new object.
        close: closes an object that is no longer needed.
        update: updates an object with the same `fixed` to the wanted content, and raises if it cannot verify that this
            succeeded; after any error but a UserError, a new object is opened.
        begin: prepares a kept object for another stage, and raises if it no longer works.

    Raises:
        UserError: raised by `update`, for a mistake that a new object would have as well.
    """
    found = _residents.pop(name, None)
    if found is not None and found.fixed == fixed:
        how: Start | None = "kept" if found.content == content else None
        try:
            if how is None and update is not None:
                update(found.value)
                how = "updated"
            if how is not None:
                begin(found.value)
                _residents[name] = _Resident(fixed, content, found.value, close)
                return found.value, how
        except UserError:
            raise
        except Exception:
            print(f"the {name} could not be {how or 'updated'} and is loaded again:", file=sys.stderr)
            traceback.print_exc()
    if found is not None:
        found.close(found.value)
        del found
        gc.collect()
    value = open_()
    if _allowed:
        _residents[name] = _Resident(fixed, content, value, close)
    return value, "loaded"


def must_close() -> bool:
    """Whether a stage has to close what it has opened when it ends, because the process does not keep it."""
    return not _allowed


@contextlib.contextmanager
def outliving_attempt() -> Iterator[None]:
    """Let processes that are started inside outlive the attempt, until this process ends.

    They do not inherit the attempt's variable, by which a supervisor finds the processes that it kills
    (`contracts.processes.kill_with_variable`).
    """
    mark = os.environ.pop(ATTEMPT, None) if _allowed else None
    try:
        yield
    finally:
        if mark is not None:
            os.environ[ATTEMPT] = mark
