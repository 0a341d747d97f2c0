"""Walks and flattens nested data as it comes from YAML and JSON files."""

from collections.abc import Iterator
from typing import Any


def leaves(value: Any) -> Iterator[Any]:
    """Yield every value inside that is neither a dict nor a list, in order."""
    yield from (leaf for _, leaf in leaves_with_paths(value))


def leaves_with_paths(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of `value` with their dotted paths, such as `scorers.reward.inputs.0`."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves_with_paths(item, f"{place}.{key}" if place else str(key))
    else:
        yield place, value


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts into one, with keys joined by dots."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flatten(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return found
