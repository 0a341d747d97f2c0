"""What a run's stages can be given: devices of this machine, and a scheduler's cluster."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.config.cluster import MachinesSection
from pipelines.config.executor import HERE, TASKS, ExecutorSection
from pipelines.config.placement import WHOLE, PlacementSection
from pipelines.config.run import RunConfig
from pipelines.config.selecting import ARRAYS
from pipelines.environments.locked import VARIANT
from pipelines.graph import Node, Placement
from pipelines.machine import cores, default_parallel, gpu_count


@dataclass(frozen=True)
class Cluster:
    """What a run's stages can be given."""

    executor: ExecutorSection
    placement: PlacementSection
    gpus: int
    """GPUs of this machine."""
    cores: int
    """Cores of this machine, which are the devices of pools where it has no GPU."""
    parallel: int
    """Stages at once, where no scheduler and no pool of devices decides."""
    scheduler_has_gpus: bool = True
    """Whether what is asked of a scheduler may have GPUs."""
    machines: int = 1
    """Machines that the GPUs are in, the first of them in the first one, where several are planned for as one."""

    @property
    def devices(self) -> int:
        """Devices of this machine that stages can be given parts of."""
        return self.gpus or self.cores

    @property
    def unit(self) -> str:
        """What they are."""
        return "GPU" if self.gpus else "core"

    @property
    def is_divided(self) -> bool:
        """Whether the strategy gives stages parts of this machine."""
        return self.placement.strategy not in WHOLE

    def machines_of(self, devices: Sequence[int]) -> int:
        """How many machines these devices are in."""
        each = max(1, self.devices // self.machines)
        return len({device // each for device in devices})

    def asked_of(self, node: Node) -> int:
        """Devices that a stage's jobs have of a scheduler: GPUs, or where they ask for none one core for each of its
        processes."""
        entry, layout = self.executor.entry(node), node.stage.layout(node.config)
        gpus = (entry.gpus or 0) if self.scheduler_has_gpus else 0
        if node.workload in ARRAYS:
            return (entry.tasks or TASKS) * max(1, gpus)
        return (entry.nodes or layout.nodes) * gpus or layout.processes

    def shares(self, placement: Placement) -> int | None:
        """Stages that may have a device of these at once; None: any number, because a scheduler decides."""
        if placement.executor not in HERE:
            return self.executor.parallel
        return 1 if placement.exclusive and placement.devices else self.parallel


def threads_here(executor: ExecutorSection) -> int:
    """Threads of each process of a stage on this machine, where nobody says."""
    return max(1, (os.cpu_count() or 1) // (executor.parallel or default_parallel()))


def cluster_as_written(config: RunConfig) -> Cluster:
    """What a run will have: this machine, or the GPUs that its config is written for (`hardware`) where it has none."""
    return cluster_of(config, gpu_count() or (config.hardware.gpus if config.hardware is not None else 0))


def config_on_machines(config: RunConfig) -> RunConfig:
    """The config of a run on machines that there are not yet: see `cluster_of_machines`."""
    kept = {key: getattr(config.executor, key) for key in ("retries", "backoff_seconds")}
    if config.executor.uses_scheduler:
        kept["warm"] = False
    else:
        kept |= {"warm": config.executor.warm, "parallel": config.executor.parallel}
    return config.model_copy(update={"executor": ExecutorSection(**kept), "hardware": None})


def cluster_of_machines(config: RunConfig, section: MachinesSection) -> Cluster:
    """What a run would have on machines that there are not yet.

    All of them are one large machine, whose stages are processes of it, whatever `executor` says of a scheduler: that
    is what strategies and pools divide. What a scheduler adds, the time in its queue, is in the section.
    """
    return replace(cluster_of(config_on_machines(config), section.total), machines=section.machines)


def cluster_of(config: RunConfig, gpus: int | None = None) -> Cluster:
    """What a run has: this machine, and the scheduler that its config names.

    Args:
        gpus: as if this machine had so many.
    """
    gpus = gpu_count() if gpus is None else gpus
    placement = config.placement
    beside = max(2, cores() // 2) if placement.strategy not in WHOLE else default_parallel(gpus)
    return Cluster(
        config.executor,
        placement,
        gpus,
        cores(),
        config.executor.parallel or beside,
        os.environ.get(VARIANT) != "cpu",
    )
