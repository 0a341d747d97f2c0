"""The scorer kind `regex`: whether an answer matches a regular expression."""

import functools
import re
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from annotation.scorers.base import ScoreConfig, WorkerSettings
from contracts.config import identity


class RegexSettings(WorkerSettings):
    """Settings of a regular expression check."""

    kind: Literal["regex"] = identity()
    """Whether a regular expression matches."""
    pattern: str = identity(min_length=1)
    """The regular expression, as Python's `re` has it; (?i) at its beginning ignores case, (?s) lets . match
    newlines."""
    match: Literal["anywhere", "whole"] = identity("anywhere")
    """Where the pattern has to match: anywhere in the response, or the whole of it."""
    found: float = identity(1.0)
    """The score if it matches."""
    absent: float = identity(0.0)
    """The score if it does not."""

    calls: ClassVar[str] = "annotation.scorers.regex:judge"

    @field_validator("pattern")
    @classmethod
    def _check(cls, value: str) -> str:
        return valid_pattern(value)


class RegexConfig(RegexSettings, ScoreConfig):
    """Score every completion by a regular expression."""


def valid_pattern(pattern: str) -> str:
    """Check that a pattern is a regular expression, and return it.

    Raises:
        ValueError: it is not.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


def judge(
    *, response: str, pattern: str, match: str, found: float, absent: float, **others: Any
) -> dict[str, float | str | None]:
    """The score `found` or `absent`, with the named groups of the match or else its text."""
    compiled = _compiled(pattern)
    place = compiled.search(response) if match == "anywhere" else compiled.fullmatch(response)
    if place is None:
        return {"score": absent}
    named = {name: text for name, text in place.groupdict().items() if name != "score"}
    return {"score": found, **(named or {"matched": place[0][:1000]})}


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
