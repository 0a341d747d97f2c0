"""Places the stages of a run's graph: assigns devices to each, and its layout on them.

Placement does not change results, so it does not enter stage keys. By default a stage has all devices of its machine,
and stages run one after another.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from contracts.config import StageConfig
from contracts.errors import UserError
from pipelines.config.executor import LOCAL_KINDS, StageSection
from pipelines.config.placement import PlacementSection
from pipelines.config.run import RunConfig
from pipelines.config.selecting import ARRAY_KINDS, matching_entries
from pipelines.graph import Graph, Node, Placement
from pipelines.iteration import build_graph
from pipelines.planning.cluster import Cluster, cluster_of
from pipelines.planning.strategies import placements
from pipelines.text import plural


def place(graph: Graph, cluster: Cluster) -> Graph:
    """Place every stage of a graph.

    Raises:
        UserError: a stage does not fit on its devices or on those requested from a scheduler; or the pools ask for more
            devices than there are.
    """
    given = placements(graph, cluster)
    sizes = {name: configured_sizes(node, cluster.placement) for name, node in graph.nodes.items()}
    nodes = {name: place_stage(node, given[name], sizes[name], cluster) for name, node in graph.nodes.items()}
    return graph.with_nodes(nodes)


def place_stage(node: Node, given: Placement, sizes: Mapping[str, Any], cluster: Cluster) -> Node:
    """Place one stage on its devices, with the sizes of its layout.

    Raises:
        UserError: the layout does not fit on the devices, or its sizes contradict each other.
    """
    node = replace(node, config=_with_layout(node, sizes), placement=given)
    entry = cluster.executor.entry(node)
    config = (
        _config_on_this_machine(node, cluster)
        if entry.kind in LOCAL_KINDS
        else _config_on_scheduler(node, entry, cluster)
    )
    return replace(node, config=config)


def placed_if_possible(graph: Graph, cluster: Cluster) -> Graph:
    """Place a graph, or return it unplaced if this machine does not have the devices of the plan, for commands that
    only read."""
    try:
        return place(graph, cluster)
    except UserError:
        return graph


def placed_graph(config: RunConfig, iterations: int, cluster: Cluster | None = None) -> Graph:
    """Build the graph of a run and place it on its own or another cluster.

    Raises:
        UserError: the config of the run or of a stage is invalid, or a stage cannot be placed.
    """
    return place(build_graph(config, iterations), cluster or cluster_of(config))


def configured_sizes(node: Node, placement: PlacementSection) -> dict[str, Any]:
    """The sizes of a stage's layout in the plan's entries, as far as the stage has them."""
    sizes: dict[str, Any] = {}
    for entry in matching_entries(node, placement.stages):
        sizes |= entry.layout.model_dump(exclude_unset=True, exclude_none=True)
    return {key: size for key, size in sizes.items() if key in node.stage.layout_keys}


def _with_layout(node: Node, sizes: Mapping[str, Any]) -> StageConfig:
    try:
        config: StageConfig = node.stage.with_layout(node.config, sizes) if sizes else node.config
    except UserError as error:
        raise UserError(f"placement.stages, for stage {node.name}: {error}") from error
    return config


def _config_on_this_machine(node: Node, cluster: Cluster) -> StageConfig:
    """The config of a stage on this machine, or on machines simulated as one."""
    layout = node.stage.layout(node.config)
    if layout.nodes > cluster.machines > 1:
        raise UserError(
            f"stage {node.name}: parallel.nodes is {layout.nodes}, but there are {cluster.machines} machines. Take "
            "parallel.nodes out: it follows from the stage's devices."
        )
    if layout.nodes > cluster.machines:
        raise UserError(
            f"stage {node.name}: parallel.nodes is {layout.nodes}, but it runs on this machine alone. Set "
            "executor to a scheduler, or parallel.nodes=1."
        )
    assert node.placement is not None
    if not cluster.is_divided:
        whole: StageConfig = node.stage.spread(node.config, cluster.gpus)
        return _spread_over_machines(node, whole, cluster)
    available = len(node.placement.devices) if cluster.gpus else 0
    config: StageConfig = node.stage.spread(node.config, available)
    processes = node.stage.layout(config).processes
    if available and (wanted := processes * max(1, node.gpus)) > available:
        each = "1 process" if processes == 1 else f"{processes} processes"
        where = f"its pool {node.placement.pool} has" if node.placement.pool else "its part of the machine has"
        raise UserError(
            f"stage {node.name} takes {plural(wanted, 'GPU')} ({each} of {max(1, node.gpus)}), but "
            f"{where} {available}. Give it more in placement.pools, or fewer processes."
        )
    return _spread_over_machines(node, config, cluster)


def _spread_over_machines(node: Node, config: StageConfig, cluster: Cluster) -> StageConfig:
    """Set the number of machines that the processes of a training are on."""
    layout = node.stage.layout(config)
    if cluster.machines == 1 or node.workload != "training" or layout.fixed_nodes:
        return config
    assert node.placement is not None
    nodes = cluster.machines_of(node.placement.devices[: layout.processes])
    if nodes == 1 or layout.processes % nodes:
        return config
    spread: StageConfig = node.stage.spread(config, len(node.placement.devices), nodes)
    return spread


def _config_on_scheduler(node: Node, entry: StageSection, cluster: Cluster) -> StageConfig:
    """The config of a stage on the devices that its jobs request from a scheduler."""
    gpus = (entry.gpus or 0) if cluster.scheduler_has_gpus else 0
    if node.workload == "training":
        return _spread_over_nodes(node, entry.nodes, gpus)
    if node.workload not in ARRAY_KINDS:
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


def _spread_over_nodes(node: Node, nodes: int | None, gpus: int) -> StageConfig:
    """The config of a training on machines with `gpus` each; without GPUs with as many processes as the config says."""
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
