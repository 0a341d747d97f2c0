"""Represents the graph of a run: its stages, and which of them read the outputs of which others."""

import copy
import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from contracts.config import StageConfig, validate
from contracts.declaration import Stage, Workload

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """The devices assigned to a stage."""

    executor: str
    """The executor that runs the stage, whose devices these are."""
    devices: tuple[int, ...]
    """Device numbers from 0; empty: the stage needs no device and runs next to those that do."""
    pool: str = ""
    """The pool that the devices belong to, if the plan has several."""
    exclusive: bool = False
    """Whether the stage sees only these devices, and no other stage uses them at the same time."""
    partition: str | None = None
    """The scheduler partition for its jobs."""
    nodes: str | None = None
    """The cluster nodes for its jobs, in the scheduler's notation."""

    @functools.cached_property
    def bits(self) -> int:
        """The devices as a bit mask: bit 1 + d for device d; bit 0 for a stage without devices."""
        return sum(2 << device for device in self.devices) or 1


@dataclass(frozen=True)
class Node:
    """One occurrence of a stage in a run."""

    name: str
    """Path of its output relative to the run directory, for example iteration-001/training."""
    stage: Stage[Any]
    """The declaration of its stage."""
    config: StageConfig
    inputs: tuple[Path, ...] = field(compare=False)
    """Every path that it reads."""
    needs: tuple[str, ...] = field(compare=False)
    """Names of the nodes that it waits for: the producers of its inputs, and gates."""
    iteration: int | None
    """Its iteration; None for artifacts made once, before the first iteration."""
    role: str
    """Its purpose in the iteration: "training", "reward", "heldout/reward". Several roles may use one stage."""

    environment: str = ""
    """Name of the environment that it runs in."""
    placement: Placement | None = field(default=None, compare=False)
    """Its devices; None in a graph that is not placed."""

    @property
    def workload(self) -> Workload:
        """How the node is scheduled."""
        return self.stage.workload(self.config)

    @property
    def gpus(self) -> int:
        """GPUs per replica, on machines that have GPUs."""
        return self.stage.gpus(self.config)

    @property
    def package(self) -> str:
        """The package that implements the stage, as in python -m PACKAGE COMMAND."""
        return self.stage.package

    @property
    def output(self) -> Path:
        """The directory that the node publishes."""
        return self.config.output

    def external_inputs(self, graph: "Graph") -> list[Path]:
        """The inputs that no node of the graph produces."""
        return [path for path in self.inputs if graph.producer_name(path) is None]

    @property
    def argv(self) -> list[str]:
        """Arguments after `python`, without the config file."""
        return ["-m", self.package, *([self.stage.command] if self.stage.command != self.package else [])]

    def path(self, field: str) -> Path:
        """The path in a field of the node's config."""
        return Path(getattr(self.config, field))


class Graph:
    """Nodes in the order in which they were added. A node's output is known by its path before it exists."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nodes: dict[str, Node] = {}
        self.lag = 0
        """The largest lag from the last iteration on: its own, and those that `changes` sets for later iterations."""
        self.gates: dict[int, str] = {}
        """By iteration, the gate that decides whether it may begin, if there is one."""
        self.rollbacks: dict[str, int] = {}
        """Gates whose published decision is a rollback, each with the iteration that the run continues from."""
        self._owners: dict[Path, str] = {}
        self._origins: dict[Path, tuple[Path, bool]] = {}
        self._cache: dict[Hashable, Any] = {}

    def add(
        self,
        stage: Stage[Any],
        role: str,
        fields: Mapping[str, Any],
        *,
        iteration: int | None = None,
        environment: str | None = None,
        after: str | None = None,
    ) -> Path:
        """Add a stage and return the path of its output, which the stages that read it are given.

        Args:
            stage: its declaration.
            role: its purpose, and so its path in the iteration's directory, or in the run's if it has no iteration.
            fields: its config without `output`.
            iteration: the iteration that it belongs to, if any.
            environment: the environment that it runs in, if not its stage's usual one.
            after: a node that it waits for without reading its output, in addition to the gate in `gates`.

        Raises:
            UserError: the stage's config refuses the values.
        """
        name = name_of(iteration, role)
        output = self.directory / name
        config: StageConfig = validate(stage.config, {**fields, "output": output}, f"stage {name}")
        if name in self.nodes:
            raise ValueError(f"two stages are named {name}")
        inputs = tuple(config.input_paths())
        waits = [gate for gate in (self.gates.get(iteration or 0), after) if gate is not None]
        needs = tuple(dict.fromkeys([*(owner for path in inputs if (owner := self.producer_name(path))), *waits]))
        self.nodes[name] = Node(name, stage, config, inputs, needs, iteration, role, environment or stage.environment)
        self._owners[output] = name
        return output

    def with_nodes(self, nodes: dict[str, Node]) -> "Graph":
        """Copy the graph with other nodes, which must differ only in what does not change results, such as
        placement."""
        other = copy.copy(self)  # shares everything cached about paths
        other.nodes = nodes
        return other

    def replace_with(self, other: "Graph") -> None:
        """Replace this graph's contents by another's, for everything that holds a reference to it."""
        vars(self).update(vars(other))

    def producer_name(self, path: Path) -> str | None:
        """Name of the node that produces `path`, which may be a file in its output; None if no node does."""
        if (known := self._owners.get(path)) is not None:
            return known
        if not path.is_relative_to(self.directory):
            return None
        inside = path.relative_to(self.directory)
        for candidate in [inside, *inside.parents]:
            if (name := candidate.as_posix()) in self.nodes:
                self._owners[path] = name
                return name
        return None

    def producer(self, path: Path) -> Node | None:
        """The node that produces `path`; None if no node does."""
        name = self.producer_name(path)
        return self.nodes[name] if name else None

    def streams_from(self, node: "Node") -> "Node | None":
        """The node whose shards `node` can read while they are still being produced; None if there is none."""
        field = node.stage.follows(node.config)
        producer = None if field is None else self.producer(node.path(field))
        return producer if producer is not None and field is not None and producer.output == node.path(field) else None

    def sampler(self, rollouts: Path) -> Node | None:
        """The node that sampled `rollouts`, through all later filtering; None if it is not in the graph."""
        node = self.producer(rollouts)
        while node is not None:
            if "rollouts" in type(node.config).model_fields:
                node = self.producer(node.path("rollouts"))
            elif "rounds" in type(node.config).model_fields:
                node = self.producer(node.config.model_dump()["rounds"][0])
            else:
                break
        return node

    def origin(self, model: Path) -> tuple[Path, bool]:
        """The model that `model` is derived from through all stages of the run, with the same architecture.

        Also returns whether one of these stages gives it a score head.
        """
        chain: list[tuple[Path, bool]] = []
        while (found := self._origins.get(model)) is None:
            node = self.producer(model)
            start = node.stage.origin(node.config) if node else None
            if node is None or start is None:
                found = (model, False)
                break
            chain.append((model, node.stage.has_score_head(node.config)))
            model = start
        for made, gives_head in reversed(chain):
            found = self._origins[made] = (found[0], found[1] or gives_head)
        return found

    def cached(self, key: Hashable, compute: Callable[[], T | None]) -> T | None:
        """The result of `compute`, cached under `key`. None is not cached: nothing is known yet."""
        if (found := self._cache.get(key)) is None:
            found = self._cache[key] = compute()
        return found  # type: ignore[no-any-return]

    def depending_on(self, name: str) -> set[str]:
        """A node and those that depend on it, directly or indirectly."""
        found = {name}
        for node in self.nodes.values():  # in which a node comes after those that it needs
            if found.intersection(node.needs):
                found.add(node.name)
        return found

    def by_urgency(self) -> list[Node]:
        """The nodes, those with the longest chain of dependents first: training before evaluation."""
        chain = dict.fromkeys(self.nodes, 0)
        for node in reversed(self.nodes.values()):
            for needed in node.needs:
                chain[needed] = max(chain[needed], chain[node.name] + 1)
        return sorted(self.nodes.values(), key=lambda node: -chain[node.name])


def folder_of(iteration: int) -> str:
    """The directory of an iteration in a run."""
    return f"iteration-{iteration:03d}"


def tag_of(iteration: int) -> str:
    """The name of an iteration's tag on the Hub."""
    return f"iteration-{iteration}"


def sampled_from(iteration: int, lag: int) -> int:
    """The iteration whose policy `iteration` samples from; 0 is the initial policy."""
    return max(0, iteration - 1 - lag)


def name_of(iteration: int | None, role: str) -> str:
    """The name of a node."""
    return role if iteration is None else f"{folder_of(iteration)}/{role}"
