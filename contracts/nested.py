"""Nested data: what YAML and JSON files hold."""

from collections.abc import Iterator
from typing import Any


def leaves(value: Any) -> Iterator[Any]:
    """Every value within that is no dict and no list, in order."""
    yield from (leaf for _, leaf in placed_leaves(value))


def placed_leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The same with the place of each, such as `scorers.reward.inputs.0`."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from placed_leaves(item, f"{place}.{key}" if place else str(key))
    else:
        yield place, value


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The same without nested dicts: their keys are joined by dots."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return found
