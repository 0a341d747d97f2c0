"""Assigns devices to the stages of a graph according to the section `placement`.

flattening    every stage all devices of the machine; `executor.parallel` limits how many run at once
colocated     the same
interleaving  generation and training all devices, exclusively; scorers of the same answers a part each
separation    generation and scoring on one pool, training on another
async         the same; the run's `lag` lets them overlap
"""

from collections.abc import Iterable

from contracts.errors import UserError
from pipelines.config.executor import LOCAL_KINDS
from pipelines.config.placement import SEPARATING, PoolSection
from pipelines.config.selecting import ARRAY_KINDS, matching_entries
from pipelines.graph import Graph, Node, Placement
from pipelines.planning.cluster import Cluster
from pipelines.text import plural

GENERATION, SCORING, TRAINING = "generation", "scoring", "training"


def placements(graph: Graph, cluster: Cluster) -> dict[str, Placement]:
    """The devices of every stage, by name.

    Raises:
        UserError: the pools ask for more devices than there are, or a stage is in no pool.
    """
    kinds = {name: str(cluster.executor.entry(node).kind) for name, node in graph.nodes.items()}
    if not cluster.is_divided:
        if cluster.placement.pools:
            raise UserError(
                f"placement.pools names {', '.join(cluster.placement.pools)}, but with placement.strategy="
                f"{cluster.placement.strategy} every stage has all devices. Take `pools` out, or choose interleaving, "
                "separation or async."
            )
        whole = tuple(range(max(1, cluster.gpus)))
        return {name: Placement(kind, whole if kind in LOCAL_KINDS else (0,)) for name, kind in kinds.items()}
    pools = {name: _pool_of(node, cluster) for name, node in graph.nodes.items()}
    here = {name for name, kind in kinds.items() if kind in LOCAL_KINDS}
    devices = _devices_of_pools((pools[name] for name in here), cluster)
    parts = _parts(graph, [node for name, node in graph.nodes.items() if name in here and not pools[name]], cluster)
    found = {}
    for name, node in graph.nodes.items():
        pool = pools[name] or ""
        if name not in here:
            section = cluster.placement.pools.get(pool, PoolSection())
            found[name] = Placement(kinds[name], (0,), pool, partition=section.partition, nodes=section.nodes)
            continue
        given: tuple[int, ...] = ()
        if pool:
            given = devices[pool]
        elif node.stage.uses_devices(node.config):
            given = parts.get(name, tuple(range(cluster.devices)))
        found[name] = Placement(kinds[name], given, pool, exclusive=True)
    return found


def _pool_of(node: Node, cluster: Cluster) -> str | None:
    """The pool of a stage: by its entry, its kind, or the strategy; None if it is in none."""
    section = cluster.placement
    named = None
    for entry in matching_entries(node, section.stages):
        named = entry.pool or named
    if named is not None:
        return named
    if not node.stage.uses_devices(node.config):
        return node.workload if node.workload in section.pools else None
    kind = SCORING if node.workload == "light" else node.workload
    if kind in section.pools:
        return kind
    if kind == SCORING and GENERATION in section.pools:
        return GENERATION
    if section.strategy in SEPARATING:
        if section.pools and not section.pools.keys() & {GENERATION, SCORING, TRAINING}:
            if cluster.executor.entry(node).kind not in LOCAL_KINDS:  # it needs no device of this machine
                return None
            raise UserError(
                f"stage {node.name} is in none of the pools {', '.join(section.pools)}: with placement.strategy="
                f"{section.strategy} every stage that computes is in one. Set placement.stages.{kind}=POOL, or call a "
                f"pool {GENERATION if kind in ARRAY_KINDS else kind}."
            )
        return TRAINING if kind == TRAINING else GENERATION
    return None


def _devices_of_pools(wanted: Iterable[str | None], cluster: Cluster) -> dict[str, tuple[int, ...]]:
    """The devices of the pools that set them, and of the other pools of local stages, which share the rest.

    Raises:
        UserError: there are too few devices.
    """
    available, unit, sections = cluster.devices, cluster.unit, cluster.placement.pools
    has = f"this machine has {plural(available, unit)}" + ("" if cluster.gpus else " and no GPU")
    found: dict[str, tuple[int, ...]] = {}
    for name, section in sections.items():
        if isinstance(section.devices, list):
            if beyond := [device for device in section.devices if device >= available]:
                raise UserError(
                    f"placement.pools.{name} has device {beyond[0]}, but {has}, counted from 0. Name others."
                )
            found[name] = tuple(section.devices)
    free = [device for device in range(available) if not any(device in had for had in found.values())]
    for name, section in sections.items():
        if isinstance(section.devices, int):
            if section.devices > len(free):
                asked = sum(len(had) for had in found.values()) + section.devices
                raise UserError(f"placement.pools ask for {asked} devices up to {name}, but {has}. Ask for fewer.")
            found[name], free = tuple(free[: section.devices]), free[section.devices :]
    rest = sorted({name for name in wanted if name and name not in found})  # generation before training
    if len(rest) > len(free):
        raise UserError(
            f"placement.strategy is {cluster.placement.strategy}, with the pools {', '.join([*found, *rest])}; "
            f"{has}, which leaves {len(free) or 'none'} for {' and '.join(rest)}. Give the other pools fewer, put all "
            "stages in one of them (placement.stages), or choose placement=flattening."
        )
    for number, name in enumerate(rest):
        share = -(-len(free) // (len(rest) - number))
        found[name], free = tuple(free[:share]), free[share:]
    return found


def _parts(graph: Graph, nodes: list[Node], cluster: Cluster) -> dict[str, tuple[int, ...]]:
    """Parts of the machine for the scorers of the same answers, so that they can run at the same time.

    The first scorers get the larger parts. If there are more scorers than devices, each gets one device, and some take
    turns.
    """
    nodes_by_iteration: dict[int | None, list[Node]] = {}
    for node in graph.nodes.values():
        nodes_by_iteration.setdefault(node.iteration, []).append(node)
    levels: dict[str | None, dict[str, int]] = {}
    groups: dict[tuple[str | None, int], list[Node]] = {}
    for node in nodes:
        if node.workload == "scoring":
            answers = graph.producer_name(node.path("rollouts"))
            if answers not in levels:
                levels[answers] = _levels(answers, nodes_by_iteration[node.iteration])
            groups.setdefault((answers, levels[answers].get(node.name, 0)), []).append(node)
    found: dict[str, tuple[int, ...]] = {}
    for group in groups.values():
        free = list(range(cluster.devices))
        for number, node in enumerate(group):
            share = -(-len(free) // (len(group) - number)) if free else 0
            found[node.name] = tuple(free[:share]) or (number % cluster.devices,)
            free = free[share:]
    return found


def _levels(start: str | None, nodes: list[Node]) -> dict[str, int]:
    """The distance of each stage from `start`, in stages; stages at the same distance do not depend on each other."""
    found = {} if start is None else {start: 0}
    for node in nodes:
        if before := [found[need] for need in node.needs if need in found]:
            found.setdefault(node.name, 1 + max(before))
    return found
