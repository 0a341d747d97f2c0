"""Matches the keys of config entries to stages: by their kind, role, name, or a pattern."""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar

from contracts.declaration import Workload

T = TypeVar("T")

ARRAY_KINDS: tuple[Workload, ...] = ("generation", "scoring")
"""Kinds of stages that run as a job array, whose tasks share the shards."""
HEAVY_KINDS: tuple[Workload, ...] = (*ARRAY_KINDS, "training")
"""Kinds that load a model and take most of a run's time."""
KINDS: tuple[Workload, ...] = (*HEAVY_KINDS, "light")


class SelectableStage(Protocol):
    """The properties of a stage that decide which entries match it."""

    @property
    def name(self) -> str:
        """The stage's name in the run."""
        ...

    @property
    def role(self) -> str:
        """The stage's role in the iteration."""
        ...

    @property
    def workload(self) -> Workload:
        """The stage's workload, which decides how it is scheduled."""
        ...

    @property
    def gpus(self) -> int:
        """GPUs per replica, on machines that have GPUs."""
        ...


def matches(stage: SelectableStage, key: str) -> bool:
    """Whether a config key matches a stage: its kind, its role ("reference"), its name, or a pattern of these two."""
    return key == stage.workload or any(fnmatch.fnmatchcase(name, key) for name in (stage.name, stage.role))


def matching_entries(stage: SelectableStage, entries: Mapping[str, T]) -> Iterator[T]:
    """The entries that match a stage, in their order; later ones override earlier ones."""
    return (entry for key, entry in entries.items() if matches(stage, key))
