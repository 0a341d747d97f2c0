"""Placement: a pass over a run's graph that gives every stage devices, and spreads it over them.

Nothing of it changes what is computed, so nothing of it is in a stage's key. By default a stage has all devices of the
place where it runs, one stage after another.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from contracts.config import StageConfig
from contracts.errors import UserError
from pipelines.config.executor import ARRAYS, HERE, ExecutorSection, StageSection
from pipelines.config.run import RunConfig
from pipelines.environments.locked import VARIANT
from pipelines.graph import Graph, Node, Placement
from pipelines.iteration import build_graph
from pipelines.machine import default_parallel, gpu_count


@dataclass(frozen=True)
class Pool:
    """Devices that stages are given: all GPUs of this machine; elsewhere one for all that is there."""

    name: str
    """The executor that runs stages on them."""
    devices: int
    shares: int | None
    """Stages that may have a device at once; None: any number, because a scheduler decides."""


@dataclass(frozen=True)
class Cluster:
    """What a run's stages can be given."""

    executor: ExecutorSection
    gpus: int
    """GPUs of this machine."""
    parallel: int
    """Stages at once, where no scheduler decides."""
    scheduler_has_gpus: bool = True
    """Whether what is asked of a scheduler may have GPUs."""

    def pool(self, name: str) -> Pool:
        """The devices behind an executor."""
        if name in HERE:
            return Pool(name, max(1, self.gpus), self.parallel)
        return Pool(name, 1, self.executor.parallel)

    def has_room(self, placement: Placement, taken: Iterable[Placement]) -> bool:
        """Whether a stage can be started beside those that have these devices now."""
        pool = self.pool(placement.pool)
        if pool.shares is None:
            return True
        shares = Counter(device for other in taken if other.pool == pool.name for device in other.devices)
        return all(shares[device] < pool.shares for device in placement.devices)


def cluster_of(config: RunConfig, gpus: int | None = None) -> Cluster:
    """What a run has: this machine, and the scheduler that its config names.

    Args:
        gpus: as if this machine had so many.
    """
    return Cluster(
        config.executor,
        gpu_count() if gpus is None else gpus,
        config.executor.parallel or default_parallel(),
        os.environ.get(VARIANT) != "cpu",
    )


def place(graph: Graph, cluster: Cluster) -> Graph:
    """The same graph, with devices for every stage and each spread over its own.

    Raises:
        UserError: a stage cannot be spread over what there is, or what is asked of a scheduler.
    """
    nodes = {}
    for name, node in graph.nodes.items():
        entry = cluster.executor.entry(node)
        assert entry.kind is not None
        config = _here(node, cluster.gpus) if entry.kind in HERE else _on_scheduler(node, entry, cluster)
        pool = cluster.pool(entry.kind)
        nodes[name] = replace(node, config=config, placement=Placement(pool.name, tuple(range(pool.devices))))
    return graph.with_nodes(nodes)


def placed_graph(config: RunConfig, iterations: int) -> Graph:
    """The stages of a run, placed on what it has.

    Raises:
        UserError: the recipe or a stage's config is wrong, or a stage cannot be placed.
    """
    return place(build_graph(config, iterations), cluster_of(config))


def _here(node: Node, gpus: int) -> StageConfig:
    """A stage over all devices of this machine."""
    layout = node.stage.layout(node.config)
    if layout.nodes > 1:
        raise UserError(
            f"stage {node.name}: parallel.nodes is {layout.nodes}, but it runs on this machine alone. Set "
            "executor to a scheduler, or parallel.nodes=1."
        )
    config: StageConfig = node.stage.spread(node.config, gpus)
    return config


def _on_scheduler(node: Node, entry: StageSection, cluster: Cluster) -> StageConfig:
    """A stage over what is asked of a scheduler for it."""
    gpus = (entry.gpus or 0) if cluster.scheduler_has_gpus else 0
    if node.workload == "training":
        return _over_nodes(node, entry.nodes, gpus)
    if node.workload not in ARRAYS:
        return node.config
    replicas = node.stage.layout(node.config).processes
    if replicas > 1:
        raise UserError(
            f"stage {node.name}: replicas is {replicas}, but on {entry.kind} the tasks of the job array are the "
            f"replicas. Take it out, and set executor.stages.{node.workload}.tasks={replicas}."
        )
    if 0 < gpus < node.gpus:
        raise UserError(
            f"stage {node.name}: every task asks {entry.kind} for {gpus} GPU, but its model takes {node.gpus} "
            f"(tensor_parallel). Set executor.stages.{node.workload}.gpus={node.gpus}."
        )
    return node.config


def _over_nodes(node: Node, nodes: int | None, gpus: int) -> StageConfig:
    """A training over machines with `gpus` each; without any, as many processes as the config says."""
    layout = node.stage.layout(node.config)
    if nodes is not None and layout.fixed_nodes and nodes != layout.nodes:
        raise UserError(
            f"stage {node.name}: parallel.nodes is {layout.nodes}, but the executor's `nodes` is {nodes}. Set one of "
            "them."
        )
    nodes = nodes or layout.nodes
    spread = node.stage.layout(node.stage.spread(node.config, nodes * gpus))
    if gpus and spread.processes > nodes * gpus:
        raise UserError(
            f"stage {node.name}: parallel ({layout.shown}) has {spread.processes} processes, but the job has "
            f"{nodes * gpus} GPUs (nodes={nodes}, gpus={gpus}). Ask for more in executor.stages.training, or set "
            "parallel to fewer."
        )
    if spread.processes % nodes:
        raise UserError(
            f"stage {node.name}: nodes={nodes} does not divide the {spread.processes} processes of parallel "
            f"({spread.shown}). Every node runs equally many: set executor.stages.training.nodes to a divisor, or "
            "parallel.dp to a multiple."
        )
    config: StageConfig = node.stage.spread(node.config, nodes * gpus, nodes)
    return config
