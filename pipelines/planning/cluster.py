"""Describes the hardware that the stages of a run can be placed on: this machine's devices, and a scheduler's
cluster."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.config.cluster import MachinesSection
from pipelines.config.executor import DEFAULT_TASKS, LOCAL_KINDS, ExecutorSection
from pipelines.config.placement import WHOLE, PlacementSection
from pipelines.config.run import RunConfig
from pipelines.config.selecting import ARRAY_KINDS
from pipelines.environments.locked import VARIANT
from pipelines.graph import Node, Placement
from pipelines.machine import cores, default_parallel, gpu_count


@dataclass(frozen=True)
class Cluster:
    """The hardware that stages are placed on, and the limits for running them."""

    executor: ExecutorSection
    placement: PlacementSection
    gpus: int
    """GPUs of this machine."""
    cores: int
    """Cores of this machine, which are the devices if it has no GPUs."""
    parallel: int
    """Maximum number of stages at once on devices that are not exclusive to a stage."""
    scheduler_has_gpus: bool = True
    """Whether jobs may request GPUs from the scheduler."""
    machines: int = 1
    """Number of machines that the GPUs are distributed over, in order, if several machines are simulated as one."""

    @property
    def devices(self) -> int:
        """Number of this machine's devices that stages can be assigned."""
        return self.gpus or self.cores

    @property
    def unit(self) -> str:
        """The kind of these devices: GPU or core."""
        return "GPU" if self.gpus else "core"

    @property
    def is_divided(self) -> bool:
        """Whether the strategy assigns stages parts of this machine."""
        return self.placement.strategy not in WHOLE

    def machines_of(self, devices: Sequence[int]) -> int:
        """The number of machines that these devices are in."""
        each = max(1, self.devices // self.machines)
        return len({device // each for device in devices})

    def requested_devices(self, node: Node) -> int:
        """Devices that a stage's jobs request from a scheduler: GPUs; without any, a core per array task or process."""
        entry, layout = self.executor.entry(node), node.stage.layout(node.config)
        gpus = (entry.gpus or 0) if self.scheduler_has_gpus else 0
        if node.workload in ARRAY_KINDS:
            return (entry.tasks or DEFAULT_TASKS) * max(1, gpus)
        return (entry.nodes or layout.nodes) * gpus or layout.processes

    def sharing_limit(self, placement: Placement) -> int | None:
        """Maximum number of stages that may use one of these devices at once; None: no limit, because a scheduler
        decides."""
        if placement.executor not in LOCAL_KINDS:
            return self.executor.parallel
        return 1 if placement.exclusive and placement.devices else self.parallel


def default_threads(executor: ExecutorSection) -> int:
    """Default number of threads of each process of a stage on this machine."""
    return max(1, (os.cpu_count() or 1) // (executor.parallel or default_parallel()))


def configured_cluster(config: RunConfig) -> Cluster:
    """The cluster of a run: this machine, with the GPUs of the config's `hardware` if it has none."""
    return cluster_of(config, gpu_count() or (config.hardware.gpus if config.hardware is not None else 0))


def config_on_machines(config: RunConfig) -> RunConfig:
    """The config of a run simulated on other machines: see `cluster_of_machines`."""
    kept = {key: getattr(config.executor, key) for key in ("retries", "backoff_seconds")}
    if config.executor.uses_scheduler:
        kept["warm"] = False
    else:
        kept |= {"warm": config.executor.warm, "parallel": config.executor.parallel}
    return config.model_copy(update={"executor": ExecutorSection(**kept), "hardware": None})


def cluster_of_machines(config: RunConfig, section: MachinesSection) -> Cluster:
    """The cluster of a run simulated on other machines.

    All machines form one large machine whose stages are local processes, even if `executor` names a scheduler, because
    strategies and pools divide the devices of one machine. The scheduler's queue times are in the section instead.
    """
    return replace(cluster_of(config_on_machines(config), section.total), machines=section.machines)


def cluster_of(config: RunConfig, gpus: int | None = None) -> Cluster:
    """The cluster of a run: this machine, and the scheduler that its config names.

    Args:
        gpus: number of GPUs to assume instead of this machine's.
    """
    gpus = gpu_count() if gpus is None else gpus
    placement = config.placement
    default = max(2, cores() // 2) if placement.strategy not in WHOLE else default_parallel(gpus)
    return Cluster(
        config.executor,
        placement,
        gpus,
        cores(),
        config.executor.parallel or default,
        os.environ.get(VARIANT) != "cpu",
    )
