"""Nested data: what YAML and JSON files hold."""

from collections.abc import Iterator
from typing import Any


def leaves(value: Any) -> Iterator[Any]:
    """Every value within that is no dict and no list, in order."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The same without nested dicts: their keys are joined by dots."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return found
