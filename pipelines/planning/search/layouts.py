"""Enumerates the possible layouts of stages, with predictions: those that the model allows and that fit into memory."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from contracts.errors import UserError
from contracts.outlook import Memory
from pipelines.config.executor import LOCAL_KINDS
from pipelines.graph import Graph, Node, Placement
from pipelines.planning.cluster import Cluster
from pipelines.planning.estimates import memory
from pipelines.planning.memory import Device, model_paths
from pipelines.planning.placement import configured_sizes, place_stage
from pipelines.planning.prediction import Prediction, Predictor
from pipelines.planning.preflight import layout_requirements, origin_of

Layout: TypeAlias = tuple[tuple[str, Any], ...]
"""The sizes of a layout as sorted (key, size) pairs; empty: those of the stage's own section, adapted to its
devices."""
MAX_LAYOUTS = 8
"""Maximum number of layouts of a stage, the fastest ones, that are kept for each number of devices."""
FEW_DEVICES = 16
"""Number of devices up to which all of its divisors are tried as numbers of processes."""
MICRO_BATCHES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Sizes of the micro-batch that are tried, relative to the config's."""
BEYOND_LAYERS, NO_ROOM, NO_COST, TOO_FEW, REFUSED = (
    "the model's layers or heads cannot be divided this way",
    "not enough memory",
    "their time is not known",
    "more processes than devices",
    "other settings or the number of devices do not allow it",
)
"""Reasons for leaving a layout out."""


@dataclass(frozen=True)
class LayoutOption:
    """One layout of a role's stages on a number of devices."""

    layout: Layout
    nodes: tuple[Node, ...]
    """The role's stages in this layout."""
    predictions: tuple[Prediction, ...]
    """The prediction for each of them."""
    memory: int
    """Bytes on the fullest device; without GPUs, those of all its processes."""

    @property
    def seconds(self) -> float:
        """Seconds of all its stages together."""
        return sum(prediction.seconds for prediction in self.predictions)


@dataclass(frozen=True)
class RoleStages:
    """The stages of one role, which have the same devices and layout in a plan."""

    name: str
    nodes: tuple[Node, ...]
    """The stages; not placed, unless they are a scheduler's jobs, whose placement plans do not change."""
    requested: int | None = None
    """Devices that its jobs request from a scheduler; None: plans assign devices of this machine."""

    @property
    def workload(self) -> str:
        """The workload of the stages."""
        return self.nodes[0].workload


def local_roles(graph: Graph, cluster: Cluster) -> list[RoleStages]:
    """The roles whose stages run on this machine, so that plans assign their devices."""
    return [RoleStages(role, nodes) for role, nodes in _by_role(graph, cluster, here=True).items()]


def scheduler_roles(graph: Graph, placed: Graph, cluster: Cluster) -> list[RoleStages]:
    """The roles whose stages are a scheduler's jobs.

    Args:
        graph: the graph, not placed.
        placed: the same graph, placed as the config says.
    """
    found = []
    for role, nodes in _by_role(graph, cluster, here=False).items():
        there = tuple(replace(node, placement=placed.nodes[node.name].placement) for node in nodes)
        found.append(RoleStages(role, there, requested=cluster.requested_devices(placed.nodes[nodes[-1].name])))
    return found


def _by_role(graph: Graph, cluster: Cluster, *, here: bool) -> dict[str, tuple[Node, ...]]:
    found: dict[str, list[Node]] = {}
    for node in graph.nodes.values():
        if node.stage.uses_devices(node.config) and (cluster.executor.entry(node).kind in LOCAL_KINDS) == here:
            found.setdefault(node.role, []).append(node)
    return {role: tuple(nodes) for role, nodes in found.items()}


class LayoutOptions:
    """Finds and caches the layout options of every role."""

    def __init__(
        self,
        graph: Graph,
        whole: Cluster,
        divided: Cluster,
        device: Device,
        predictor: Predictor,
        *,
        on_gpu: bool,
    ) -> None:
        self._graph = graph
        self._clusters = {False: whole, True: divided}
        self._on_gpu = on_gpu
        self._device = device
        self._predictor = predictor
        self._found: dict[tuple[str, int, bool], list[LayoutOption]] = {}
        self._exact: dict[tuple[str, int], list[LayoutOption]] = {}
        self._usable: dict[tuple[str, int, int, int], bool] = {}
        self._labels = {name: node.stage.label(node.config) for name, node in graph.nodes.items()}
        self._others: dict[tuple[str, str], Graph] = {}
        self._rooms: dict[str, int] = {}
        self.left_out: dict[str, Counter[str]] = {}
        """By role and reason, the number of layouts that were left out, over all numbers of devices."""
        self.looked_at = 0
        """Number of layouts that were predicted."""
        self.memory_unknown: set[str] = set()
        """Roles whose memory is not known, for which only the config's layout is considered."""

    def of(self, role: RoleStages, devices: int, exclusive: bool) -> list[LayoutOption]:
        """The layout options of a role on a number of devices, the fastest first.

        Args:
            exclusive: whether it has them exclusively; otherwise they are all devices, shared by as many stages at once
                as the cluster allows.
        """
        key = (role.name, devices, exclusive and role.requested is None)
        if key not in self._found and role.requested is not None:
            self._found[key] = self._of_jobs(role, devices)
        if key not in self._found:
            given = self._placement_for(role, devices, exclusive)
            found = [*filter(None, [self._configured(role, given, devices)])]
            if self._on_gpu:  # a stage may use fewer GPUs than it is given
                found += [option for used in process_counts(devices) for option in self._using_exactly(role, used)]
            else:
                found += self._options(role, given, devices)
            self._found[key] = _best(found)
        return self._found[key]

    def _of_jobs(self, role: RoleStages, devices: int) -> list[LayoutOption]:
        """The layout options of a scheduler's jobs. The requested resources stay as written, because queue times for
        others are not known; only the layouts of trainings vary, since an array has one copy per task."""
        given = role.nodes[-1].placement
        assert given is not None
        written = self._configured(role, given, devices)
        found = [] if written is None else [written]
        if self._device.bytes == 0 and written is not None:
            self._rooms[role.name] = written.memory
        if role.workload == "training" and (self._device.bytes or written is not None):
            for used in process_counts(devices) if self._on_gpu else [devices]:
                found += self._options(role, given, used)
        return _best(found)

    def _using_exactly(self, role: RoleStages, used: int) -> list[LayoutOption]:
        """The layout options that use exactly this many GPUs."""
        if (role.name, used) not in self._exact:
            self._exact[role.name, used] = self._options(role, self._placement_for(role, used, True), used)
        return self._exact[role.name, used]

    def _configured(self, role: RoleStages, given: Placement, devices: int) -> LayoutOption | None:
        node = self._placed(role, (), given)
        found = self._option(role, (), node, devices) if node is not None else None
        return self._for_all_stages(role, found, given) if found is not None else None

    def _options(self, role: RoleStages, given: Placement, devices: int) -> list[LayoutOption]:
        """The best layouts other than the config's."""
        found: list[LayoutOption] = []
        last = role.nodes[-1]
        for sizes in _process_layouts(last, devices, self._is_usable(role), on_gpu=self._on_gpu):
            layout = tuple(sorted(sizes.items()))
            if (node := self._placed(role, layout, given)) is None:
                continue
            for more in _micro_batches(node):
                config = node.config.model_copy(update=more) if more else node.config
                option = self._option(
                    role, tuple(sorted({**sizes, **more}.items())), replace(node, config=config), devices
                )
                found += [option] if option is not None else []
        return [*filter(None, (self._for_all_stages(role, option, given) for option in _best(found)))]

    def without_cost(self, role: RoleStages) -> bool:
        """Whether layouts of a role were left out because they have no prediction."""
        return self.left_out.get(role.name, Counter())[NO_COST] > 0

    def _placement_for(self, role: RoleStages, devices: int, exclusive: bool) -> Placement:
        kind = str(self._clusters[exclusive].executor.entry(role.nodes[0]).kind)
        numbers = tuple(range(devices)) if exclusive or self._on_gpu else (0,)
        return Placement(kind, numbers, exclusive=exclusive)

    def _place(self, node: Node, layout: Layout, given: Placement) -> Node:
        cluster = self._clusters[given.exclusive]
        written = configured_sizes(node, cluster.placement) if given.executor not in LOCAL_KINDS else {}
        return place_stage(node, node.placement or given, {**written, **dict(layout)}, cluster)

    def _placed(self, role: RoleStages, layout: Layout, given: Placement) -> Node | None:
        try:
            return self._place(role.nodes[-1], layout, given)
        except UserError:
            self.left_out.setdefault(role.name, Counter())[REFUSED] += 1
            return None

    def _option(self, role: RoleStages, layout: Layout, last: Node, devices: int) -> LayoutOption | None:
        """The option of a layout for the last stage of a role; None if it is not possible."""
        reasons = self.left_out.setdefault(role.name, Counter())
        each = last.gpus if self._on_gpu else 1
        if role.requested is None and last.stage.layout(last.config).processes * max(1, each) > devices:
            reasons[TOO_FEW] += 1
            return None
        if not layout and not self._fits_layers(last):
            reasons[BEYOND_LAYERS] += 1
            return None
        estimate = memory(last, self._graph, on_gpu=self._on_gpu)
        if estimate is not None and _total(estimate, self._on_gpu) > self._room(role, estimate):
            reasons[NO_ROOM] += 1
            return None
        self.looked_at += 1
        prediction = self._predicted(last)
        if prediction is None:
            reasons[NO_COST] += 1
            return None
        needed = needed_memory(estimate, prediction, last, self._on_gpu)
        if needed is None:
            self.memory_unknown.add(role.name)
            return LayoutOption(layout, (last,), (prediction,), 0) if not layout else None
        if needed > self._room(role, estimate):
            reasons[NO_ROOM] += 1
            return None
        return LayoutOption(layout, (last,), (prediction,), needed)

    def _for_all_stages(self, role: RoleStages, option: LayoutOption, given: Placement) -> LayoutOption | None:
        """Extend an option from the last stage to all stages of the role; None if one has no prediction."""
        nodes = [self._place(node, option.layout, given) for node in role.nodes[:-1]]
        known = [self._predicted(node) for node in nodes]
        predictions = tuple(prediction for prediction in known if prediction is not None)
        if len(predictions) < len(nodes):
            self.left_out[role.name][NO_COST] += 1
            return None
        return replace(option, nodes=(*nodes, *option.nodes), predictions=(*predictions, *option.predictions))

    def _predicted(self, node: Node) -> Prediction | None:
        """The prediction for a stage in a graph where it has this layout, which decides what it leaves loaded."""
        label = node.stage.label(node.config)
        if label == self._labels[node.name]:
            return self._predictor.predict(node, self._graph)
        if (node.name, label) not in self._others:
            self._others[node.name, label] = self._graph.with_nodes({**self._graph.nodes, node.name: node})
        return self._predictor.predict(node, self._others[node.name, label])

    def _room(self, role: RoleStages, estimate: Memory | None) -> float:
        """Bytes that a stage may take; for jobs on unknown devices, what it takes as written."""
        if role.requested is not None and not self._device.bytes:
            return self._rooms.get(role.name, math.inf)
        return int((estimate.share if estimate is not None else 1.0) * self._device.bytes)

    def _is_usable(self, role: RoleStages) -> Callable[[int, int, int], bool]:
        """A predicate for whether the layers of a role's models can be divided by tp, pp and sp; false for models that
        do not exist yet."""

        def is_usable(tp: int, pp: int, sp: int) -> bool:
            key = (role.name, tp, pp, sp)
            if key not in self._usable:
                sizes = {"dp": 1, "tp": tp, "pp": pp, "sp": sp, "zero": 0, "offload": []}
                node = role.nodes[-1]
                reason = REFUSED
                try:
                    node = replace(node, config=node.stage.with_layout(node.config, sizes))
                    reason = "" if self._fits_layers(node) else BEYOND_LAYERS
                except UserError:
                    pass
                if reason:
                    self.left_out.setdefault(role.name, Counter())[reason] += 1
                self._usable[key] = not reason
            return self._usable[key]

        return is_usable

    def _fits_layers(self, node: Node) -> bool:
        sizes = getattr(node.config, "parallel", None)
        try:
            for use in node.stage.models(node.config):
                there = (origin_of(use.path, self._graph) / "config.json").is_file()
                if use.check_architecture is not None and sizes is not None and sizes.is_divided and not there:
                    return False
                for requirement in layout_requirements(use, self._graph):
                    requirement()
        except UserError:
            return False
        return True


def _best(options: list[LayoutOption]) -> list[LayoutOption]:
    """The fastest options, the config's layout, and the option with the least memory."""
    ordered = sorted(options, key=lambda option: (option.seconds, option.layout != (), str(option.layout)))
    unlike = {option.layout: option for option in ordered}
    ordered = list(unlike.values())
    small = min(ordered, key=lambda option: option.memory, default=None)
    rest = [option for option in ordered[MAX_LAYOUTS:] if not option.layout or option is small]
    return ordered[:MAX_LAYOUTS] + rest


def _total(estimate: Memory, on_gpu: bool) -> int:
    """Bytes on the fullest device; without GPUs, those of all processes."""
    return estimate.total * (1 if on_gpu else estimate.processes)


def needed_memory(estimate: Memory | None, prediction: Prediction, node: Node, on_gpu: bool) -> int | None:
    """Bytes on the fullest device, or of all processes on a machine without GPUs: the larger of the estimate and the
    measurement. None for a stage with a model if neither is known."""
    known = [] if estimate is None else [_total(estimate, on_gpu)]
    if prediction.memory is not None:
        known.append(prediction.memory * (1 if on_gpu else node.stage.layout(node.config).processes))
    if known:
        return max(known)
    return None if model_paths(node) else 0


def process_counts(most: int) -> list[int]:
    """Numbers of processes up to `most` to try: powers of 2; up to FEW_DEVICES also all divisors; above also the
    largest number with three significant bits (84: 80)."""
    found = {1 << power for power in range(most.bit_length())} if most else set()
    if most <= FEW_DEVICES:
        return sorted(found | {count for count in range(1, most + 1) if most % count == 0})
    low = most.bit_length() - 3
    return sorted(found | {most >> low << low})


def _process_layouts(
    node: Node, devices: int, is_usable: Callable[[int, int, int], bool], *, on_gpu: bool
) -> Iterator[dict[str, Any]]:
    """Yield the process layouts of a stage: on all of the GPUs, or on some of the cores."""
    keys = node.stage.layout_keys
    if "replicas" in keys:
        most = devices // max(1, node.gpus if on_gpu else 1)
        for count in [most] if on_gpu and most else process_counts(most):
            yield {"replicas": count}
    if "dp" in keys:
        yield from _parallel_sizes(devices, is_usable, on_gpu=on_gpu)


def _micro_batches(node: Node) -> Iterator[dict[str, Any]]:
    """Yield the micro-batch sizes of a training, with and without gradient checkpointing."""
    if "micro_batch_tokens" not in node.stage.layout_keys:
        yield {}
        return
    tokens = int(node.config.model_dump(include={"micro_batch_tokens"})["micro_batch_tokens"])
    for size in sorted({max(1, int(tokens * times)) for times in MICRO_BATCHES}):
        for checkpointing in (False, True):
            yield {"micro_batch_tokens": size, "gradient_checkpointing": checkpointing}


def _parallel_sizes(
    devices: int, is_usable: Callable[[int, int, int], bool], *, on_gpu: bool
) -> Iterator[dict[str, Any]]:
    """Yield the sizes of a training's section `parallel`: for all GPUs, or for some of the cores."""
    for tp, pp, sp in itertools.product(
        process_counts(min(devices, 8)), process_counts(min(devices, 16)), process_counts(min(devices, 8))
    ):
        together = tp * pp * sp
        if together > devices or (on_gpu and devices % together) or (together > 1 and not is_usable(tp, pp, sp)):
            continue
        for dp in [devices // together] if on_gpu else process_counts(devices // together):
            shardings: list[tuple[Any, tuple[str, ...]]] = [(0, ())]
            if dp * sp > 1:
                shardings.append(("fsdp2", ()))
            if together == 1 and dp > 1:
                shardings += [(1, ()), (2, ()), (3, ()), (2, ("optimizer",)), (3, ("optimizer",))]
                shardings.append((3, ("optimizer", "param")))
            for zero, offload in shardings:
                yield {"dp": dp, "tp": tp, "pp": pp, "sp": sp, "zero": zero, "offload": offload}
