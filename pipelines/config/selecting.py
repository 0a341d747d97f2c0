"""How an entry of a config names the stages that it is about: by their kind, their role, their name or a pattern."""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from contracts.declaration import Workload

T = TypeVar("T")

ARRAYS: tuple[Workload, ...] = ("generation", "scoring")
"""Kinds of stages that run as a job array, whose tasks share the shards."""
HEAVY: tuple[Workload, ...] = (*ARRAYS, "training")
"""Kinds that load a model and take most of the time."""
KINDS: tuple[Workload, ...] = (*HEAVY, "light")


class Demand(Protocol):
    """What of a stage decides which settings are its own."""

    @property
    def name(self) -> str:
        """In the run."""
        ...

    @property
    def role(self) -> str:
        """What it is for in its iteration."""
        ...

    @property
    def workload(self) -> Workload:
        """What it is to a scheduler."""
        ...

    @property
    def gpus(self) -> int:
        """GPUs that one replica takes, where there are any."""
        ...


def is_named(stage: Demand, key: str) -> bool:
    """Whether a key of a config is about a stage: its kind, its role ("reference"), its name, or a pattern of these
    two."""
    return key == stage.workload or any(fnmatch.fnmatchcase(name, key) for name in (stage.name, stage.role))


def entries_of(stage: Demand, entries: Mapping[str, T]) -> Iterator[T]:
    """The entries that are about a stage, in their order: of several the later one holds."""
    return (entry for key, entry in entries.items() if is_named(stage, key))


def unused(keys: Iterable[str], stages: Iterable[Demand]) -> list[str]:
    """The keys that are about none of the stages."""
    stages = list(stages)
    return [key for key in keys if not any(is_named(stage, key) for stage in stages)]
