"""Defines the config of a cluster to simulate runs on: machines of one kind, their price, queue times and failures."""

from pathlib import Path
from typing import Self

from pydantic import field_validator, model_validator

from contracts.config import Section, read_yaml, runtime, validate


class QueueSection(Section):
    """Queue time of a stage."""

    seconds: float = runtime(0.0, ge=0)
    """The median."""
    spread: float = runtime(0.0, ge=0, le=3)
    """Standard deviation of its logarithm: with 0.7 one in six waits more than twice as long."""


class StragglersSection(Section):
    """Stages slowed down from outside: a slow device, a busy file server."""

    share: float = runtime(0.0, ge=0, le=1)
    """Share of the stages."""
    factor: float = runtime(1.5, ge=1)
    """Slowdown factor."""


class MachinesSection(Section):
    """Machines of one kind, simulated as one large machine: stages are assigned parts of all GPUs."""

    machines: int = runtime(1, ge=1, le=10_000)
    """Number of machines."""
    gpus: int = runtime(ge=1, le=1024)
    """GPUs per machine."""
    gpu: str = runtime(min_length=1)
    """GPU model: the name of a data sheet (H100-SXM, A100-80), or the driver's name."""
    gib: float | None = runtime(None, gt=0)
    """Memory of each GPU, in GiB; by default from its data sheet."""
    link: float | None = runtime(None, gt=0)
    """GB/s between two GPUs of a machine, in one direction; by default from the data sheet."""
    network: float | None = runtime(None, gt=0)
    """GB/s between GPUs of two machines, in one direction; by default from the data sheet."""
    price: float | None = runtime(None, ge=0)
    """Price of one GPU-hour."""
    currency: str = runtime("USD", min_length=1, max_length=8)
    """Currency of the price."""
    queue: QueueSection = runtime(QueueSection())
    """Queue time of each stage; a number is short for `seconds`."""
    hours_between_failures: float | None = runtime(None, gt=0)
    """Mean GPU-hours between failures that end a stage: of the GPU, of its machine, or a preemption. A stage on 64 GPUs
    fails after a 64th of that on average. By default nothing fails."""
    stragglers: StragglersSection = runtime(StragglersSection())
    """Share and factor of stages that are slowed down at random."""

    @field_validator("queue", mode="before")
    @classmethod
    def _seconds(cls, value: object) -> object:
        """Read a number as `seconds`."""
        return {"seconds": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @property
    def total(self) -> int:
        """GPUs of all machines together."""
        return self.machines * self.gpus

    @property
    def is_certain(self) -> bool:
        """Whether nothing is random: no spread of the queue, no failures, no stragglers."""
        return not (self.queue.spread or self.hours_between_failures or self.stragglers.share)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.queue.spread and not self.queue.seconds:
            raise ValueError("queue.spread is set, but queue.seconds is 0. Say how long stages wait (queue.seconds).")
        return self


def read_machines(path: Path) -> MachinesSection:
    """Read a cluster file.

    Raises:
        UserError: the file is invalid; lists every mistake.
    """
    return validate(MachinesSection, read_yaml(path), str(path))
