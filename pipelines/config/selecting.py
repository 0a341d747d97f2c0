"""Matches the keys of config entries to stages: by their kind, role, name, or a pattern."""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from contracts.declaration import Workload

T = TypeVar("T")

ARRAYS: tuple[Workload, ...] = ("generation", "scoring")
"""Kinds of stages that run as a job array, whose tasks share the shards."""
HEAVY: tuple[Workload, ...] = (*ARRAYS, "training")
"""Kinds that load a model and take most of a run's time."""
KINDS: tuple[Workload, ...] = (*HEAVY, "light")


class Demand(Protocol):
    """The properties of a stage that decide which entries match it."""

    @property
    def name(self) -> str:
        """Its name in the run."""
        ...

    @property
    def role(self) -> str:
        """Its role in the iteration."""
        ...

    @property
    def workload(self) -> Workload:
        """How it is scheduled."""
        ...

    @property
    def gpus(self) -> int:
        """GPUs per replica, on machines that have GPUs."""
        ...


def is_named(stage: Demand, key: str) -> bool:
    """Whether a config key matches a stage: its kind, its role ("reference"), its name, or a pattern of these two."""
    return key == stage.workload or any(fnmatch.fnmatchcase(name, key) for name in (stage.name, stage.role))


def entries_of(stage: Demand, entries: Mapping[str, T]) -> Iterator[T]:
    """The entries that match a stage, in their order; later ones override earlier ones."""
    return (entry for key, entry in entries.items() if is_named(stage, key))


def unused(keys: Iterable[str], stages: Iterable[Demand]) -> list[str]:
    """The keys that match none of the stages."""
    stages = list(stages)
    return [key for key in keys if not any(is_named(stage, key) for stage in stages)]
