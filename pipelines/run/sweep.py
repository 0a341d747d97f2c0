"""`pipeline sweep CONFIG key=[a,b] ...`: derives the runs for a grid of values."""

import itertools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from contracts.config import apply_overrides
from contracts.errors import UserError
from contracts.nested import flatten

MAX_RUNS = 256
"""Maximum number of runs of a sweep; more are most likely a mistake."""

LOCATION_KEYS = ("name", "directory")
"""Keys that locate the runs and cannot be swept."""
MAX_NAME_LENGTH = 100
"""Maximum length of a run's name in characters."""


@dataclass(frozen=True)
class GridPoint:
    """One run of a sweep."""

    name: str
    overrides: list[str]


def grid(overrides: list[str]) -> list[GridPoint]:
    """Every combination of the values of the keys that have a list; the other overrides apply to all runs.

    Raises:
        UserError: no key has a list of values, or there are too many combinations.
    """
    axes: dict[str, list[Any]] = {}
    fixed: list[str] = []
    for item in overrides:
        ((key, value),) = flatten(apply_overrides({}, [item])).items()
        if isinstance(value, list) and value and key not in LOCATION_KEYS:
            axes[key] = list({json.dumps(one): one for one in value}.values())  # each once
        else:
            fixed.append(item)
    count = math.prod(map(len, axes.values()))
    if not 2 <= count <= MAX_RUNS:
        raise UserError(
            f"these values make {count} {'run' if count == 1 else 'runs'}; a sweep has 2 to {MAX_RUNS}. Give a "
            "list to at least one key: training.settings.beta=[0.1,0.3] seed=[1,2]. A value that is a list itself "
            "goes into another list: generation.temperatures=[[0.7,1.0]]."
        )
    points = []
    for number, values in enumerate(itertools.product(*axes.values()), 1):
        point = dict(zip(axes, values, strict=True))
        name = _name(point)
        chosen = [f"{key}={json.dumps(value)}" for key, value in point.items()]
        points.append(GridPoint(name if len(name) <= MAX_NAME_LENGTH else f"run-{number}", [*fixed, *chosen]))
    return points


def _name(point: dict[str, Any]) -> str:
    lasts = [key.rpartition(".")[2] for key in point]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(point, lasts, strict=True)}
    return "_".join(f"{short[key]}-{_plain(value)}" for key, value in point.items())


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-")
