"""Determines a stage's resource request to Slurm, with all defaults filled in, and translates it for submitit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from contracts.declaration import Workload
from pipelines.config.executor import DEFAULT_TASKS, ExecutorKind, ExecutorSection, StageSection
from pipelines.config.selecting import ARRAY_KINDS
from pipelines.graph import Graph, Node, Placement
from pipelines.planning.estimates import memory

DEFAULT_MINUTES: dict[Workload, int] = {"generation": 240, "scoring": 240, "training": 1440, "light": 30}
CPUS_PER_GPU = 8
LIGHT_GIB = 4
MEMORY_MARGIN = 1.25
"""Requested memory as a multiple of the estimate."""
MARGIN_SECONDS = 60
"""Slurm checks time limits at intervals of up to this many seconds."""


@dataclass(frozen=True)
class Resources:
    """A stage's resource request to Slurm. For a stage on another executor only `kind` and `executor` are set."""

    kind: Workload
    executor: ExecutorKind
    tasks: int = 1
    """Tasks of its job array; 1 if it is no array."""
    nodes: int = 1
    """Nodes per job."""
    gpus: int = 0
    """GPUs per node of the job, or per task of the array."""
    gpu_type: str | None = None
    cpus: int = 1
    """CPU cores per node or task."""
    processes: int = 1
    """Processes of the stage per node or task; each gets cpus // processes cores."""
    minutes: int = 0
    """Time limit."""
    memory: str | None = None
    """Memory per node, such as "64G"; None: the cluster's default."""
    partition: str | None = None
    pool_nodes: str | None = None
    """Nodes of the stage's pool, as Slurm writes them; None: any."""
    account: str | None = None
    qos: str | None = None
    setup: tuple[str, ...] = ()
    directives: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    requeue: bool = True

    @property
    def is_array(self) -> bool:
        """Whether it is a job array, followed by a finishing job."""
        return self.executor == "slurm" and self.kind in ARRAY_KINDS


def resources_of(node: Node, executor: ExecutorSection, graph: Graph | None = None) -> Resources:
    """A stage's resource request.

    Args:
        graph: used to estimate the memory of light stages that load a model.
    """
    entry, kind = executor.entry(node), node.workload
    assert entry.kind is not None
    if entry.kind != "slurm":
        return Resources(kind, entry.kind)
    layout = node.stage.layout(node.config)
    processes = layout.processes // layout.nodes
    gpus = entry.gpus or 0
    return _with_defaults(
        entry,
        kind,
        tasks=(entry.tasks or DEFAULT_TASKS) if kind in ARRAY_KINDS else 1,
        nodes=layout.nodes,
        gpus=gpus,
        cpus=entry.cpus or (CPUS_PER_GPU * gpus if gpus else processes),
        processes=processes,
        memory=entry.memory or (_light_memory(node, graph) if kind == "light" else None),
        placement=node.placement,
    )


def finalizing_resources(executor: ExecutorSection) -> Resources:
    """The request of the small job that finishes a heavy stage: like that of a light stage, and always on Slurm."""
    entry = executor.finalizing_entry().model_copy(update={"kind": "slurm"})
    return _with_defaults(entry, "light", cpus=entry.cpus or 1, gpus=0, memory=entry.memory or f"{LIGHT_GIB}G")


def _with_defaults(entry: StageSection, kind: Workload, placement: Placement | None = None, **counts: Any) -> Resources:
    return Resources(
        kind=kind,
        executor="slurm",
        gpu_type=entry.gpu_type,
        minutes=entry.minutes or DEFAULT_MINUTES[kind],
        partition=(placement.partition if placement is not None else None) or entry.partition,
        pool_nodes=placement.nodes if placement is not None else None,
        account=entry.account,
        qos=entry.qos,
        setup=tuple(entry.setup),
        directives=entry.directives,
        requeue=entry.requeue,
        **counts,
    )


def _light_memory(node: Node, graph: Graph | None) -> str:
    """Memory of a light stage: enough for the model or arrays that it loads, if their size is known."""
    need = memory(node, graph, on_gpu=False) if graph is not None else None
    estimated = math.ceil(MEMORY_MARGIN * need.total / (1 << 30)) if need is not None else 0
    return f"{max(LIGHT_GIB, estimated)}G"


def submitit_parameters(
    resources: Resources,
    *,
    name: str,
    comment: str,
    grace_seconds: float,
    dependency: str | None = None,
    begin: float | None = None,
    teardown: Sequence[str] = (),
    exclude: str = "",
) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor for a job, or for each task of an array.

    Args:
        name: the job's name.
        comment: identifies the job's run on the cluster.
        grace_seconds: how long before the time limit the job is signalled; a margin is added, as Slurm is not exact.
        dependency: in sbatch's syntax, such as afterok:17:18. If it can no longer be fulfilled, Slurm cancels the job.
        begin: delay in seconds before it may start.
        teardown: lines of bash to run after the job's process has ended.
        exclude: nodes that it must not run on, in addition to those that `directives` exclude.
    """
    further: dict[str, Any] = {"requeue" if resources.requeue else "no-requeue": True}
    if dependency:
        further["kill-on-invalid-dep"] = "yes"
    if begin is not None and begin > 0:
        further["begin"] = f"now+{math.ceil(begin)}"
    parameters: dict[str, Any] = {
        "job_name": name,
        "comment": comment,
        "wckey": None,  # some clusters refuse submitit's default
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": resources.cpus,
        "mem": resources.memory,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "setup": list(resources.setup) or None,
        "teardown": list(teardown) or None,
        "signal_delay_s": min(math.ceil(grace_seconds) + MARGIN_SECONDS, resources.minutes * 30),  # or half the time
        "dependency": dependency,
        "array_parallelism": resources.tasks,
        "stderr_to_stdout": True,
        # Since 22.05 srun does not take the number of cores from sbatch.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus}"],
        "additional_parameters": {**further, **resources.directives},
    }
    if exclude:
        others = resources.directives.get("exclude")
        parameters["additional_parameters"]["exclude"] = f"{exclude},{others}" if others else exclude
    if resources.gpus:
        kind = f"{resources.gpu_type}:" if resources.gpu_type else ""
        parameters["gpus_per_node"] = f"{kind}{resources.gpus}"
    return parameters


def device_hours(resources: Resources) -> float:
    """GPU-hours that a stage requests, or CPU-hours without GPUs; an upper bound, since whole time limits count."""
    each = resources.gpus or resources.cpus
    return resources.tasks * resources.nodes * each * resources.minutes / 60
