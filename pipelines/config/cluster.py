"""A cluster that a run is simulated on, before there is one: machines of one kind, what they cost, what goes wrong."""

from pathlib import Path
from typing import Self

from pydantic import field_validator, model_validator

from contracts.config import Section, read_yaml, runtime, validate


class QueueSection(Section):
    """How long a stage waits before it has its devices."""

    seconds: float = runtime(0.0, ge=0)
    """The median."""
    spread: float = runtime(0.0, ge=0, le=3)
    """Standard deviation of its logarithm: with 0.7 one in six waits for more than twice as long."""


class StragglersSection(Section):
    """Stages that take longer, for no reason of theirs: a slow device, a file server that is busy."""

    share: float = runtime(0.0, ge=0, le=1)
    """How many of the stages."""
    factor: float = runtime(1.5, ge=1)
    """How many times as long they compute."""


class MachinesSection(Section):
    """Machines of one kind, as one large one: stages are given parts of all of their GPUs."""

    machines: int = runtime(1, ge=1)
    """How many."""
    gpus: int = runtime(ge=1)
    """GPUs of each."""
    gpu: str = runtime(min_length=1)
    """Their kind: the name of a data sheet (H100-SXM, A100-80), or as the driver calls it."""
    gib: float | None = runtime(None, gt=0)
    """Memory of each GPU, in GiB; by default as its data sheet says."""
    link: float | None = runtime(None, gt=0)
    """GB/s from a GPU to another one of its machine, in one direction; by default as the data sheet says."""
    network: float | None = runtime(None, gt=0)
    """GB/s from a GPU to one of another machine; by default as such machines usually have."""
    price: float | None = runtime(None, ge=0)
    """Of one GPU for an hour."""
    currency: str = runtime("USD", min_length=1, max_length=8)
    """Of the price."""
    queue: QueueSection = runtime(QueueSection())
    """What each stage waits for a scheduler; a number is short for `seconds`."""
    hours_between_failures: float | None = runtime(None, gt=0)
    """Hours that one GPU works on average until something ends the stage on it: its failure, its machine's, a
    preemption. Of 64 GPUs the first fails after a 64th of that. By default nothing fails."""
    stragglers: StragglersSection = runtime(StragglersSection())
    """Stages that are slow."""

    @field_validator("queue", mode="before")
    @classmethod
    def _seconds(cls, value: object) -> object:
        """A number is short for its seconds."""
        return {"seconds": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @property
    def total(self) -> int:
        """GPUs of all machines."""
        return self.machines * self.gpus

    @property
    def is_certain(self) -> bool:
        """Whether it says nothing of chance: no spread of the queue, no failures, no stragglers."""
        return not (self.queue.spread or self.hours_between_failures or self.stragglers.share)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.queue.spread and not self.queue.seconds:
            raise ValueError("queue.spread is set, but queue.seconds is 0. Say how long stages wait (queue.seconds).")
        return self


def read_machines(path: Path) -> MachinesSection:
    """Read a cluster's file.

    Raises:
        UserError: anything is wrong with it; lists every mistake.
    """
    return validate(MachinesSection, read_yaml(path), str(path))
