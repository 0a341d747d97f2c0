"""The graph of a run: stages, and which of them need which others' outputs."""

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from contracts.config import StageConfig, validate
from contracts.declaration import Stage, Workload

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """Devices that a stage is given."""

    pool: str
    """The executor that it runs on, and so whose devices."""
    devices: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One stage of a run."""

    name: str
    """Path of its output below the run directory, for example iteration-001/training."""
    stage: Stage[Any]
    """What kind of stage it is."""
    config: StageConfig
    inputs: tuple[Path, ...] = field(compare=False)
    """All that it reads."""
    needs: tuple[str, ...] = field(compare=False)
    """Names of the nodes whose outputs it reads."""
    iteration: int | None
    """The iteration that it belongs to; None for what is made once, before the first one."""
    role: str
    """What it is for there: "training", "reward", "heldout/reward". Several may be of one stage."""

    environment: str = ""
    """The environment that it runs in."""
    placement: Placement | None = field(default=None, compare=False)
    """None in a graph that is not placed."""

    @property
    def workload(self) -> Workload:
        """What it is to a scheduler."""
        return self.stage.workload(self.config)

    @property
    def gpus(self) -> int:
        """GPUs that one replica takes, where there are any."""
        return self.stage.gpus(self.config)

    @property
    def package(self) -> str:
        """The package that is run: python -m PACKAGE COMMAND."""
        return self.stage.package

    @property
    def output(self) -> Path:
        """The directory that it publishes."""
        return self.config.output

    def external_inputs(self, graph: "Graph") -> list[Path]:
        """The inputs that no stage of the graph makes."""
        return [path for path in self.inputs if graph.owner(path) is None]

    @property
    def argv(self) -> list[str]:
        """Arguments after `python`, without the config file."""
        return ["-m", self.package, *([self.stage.command] if self.stage.command != self.package else [])]

    def path(self, field: str) -> Path:
        """The path in one of its config's fields."""
        return Path(getattr(self.config, field))


class Graph:
    """Stages in the order in which they were added; an output is known by its path before it exists."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nodes: dict[str, Node] = {}
        self._owners: dict[Path, str] = {}
        self._origins: dict[Path, tuple[Path, bool]] = {}
        self._known: dict[Hashable, Any] = {}

    def add(
        self,
        stage: Stage[Any],
        role: str,
        fields: Mapping[str, Any],
        *,
        iteration: int | None = None,
        environment: str | None = None,
    ) -> Path:
        """Add a stage and return the path of its output, to be given to the stages that read it.

        Args:
            stage: its declaration.
            role: what it is for, and so its place in the iteration's directory; in the run's, where it has none.
            fields: of its config, without `output`.
            iteration: the one that it belongs to, if any.
            environment: what it runs in, if not in what stages of its kind do.

        Raises:
            UserError: the stage's config refuses the values.
        """
        name = name_of(iteration, role)
        output = self.directory / name
        config: StageConfig = validate(stage.config, {**fields, "output": output}, f"stage {name}")
        if name in self.nodes:
            raise ValueError(f"two stages are named {name}")
        inputs = tuple(config.input_paths())
        needs = tuple(dict.fromkeys(owner for path in inputs if (owner := self.owner(path))))
        self.nodes[name] = Node(name, stage, config, inputs, needs, iteration, role, environment or stage.environment)
        self._owners[output] = name
        return output

    def with_nodes(self, nodes: dict[str, Node]) -> "Graph":
        """The same graph with nodes that differ in nothing that decides what they compute."""
        other = copy.copy(self)  # with all that is known of paths
        other.nodes = nodes
        return other

    def owner(self, path: Path) -> str | None:
        """The node that makes `path`, which may be a file inside its output."""
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

    def maker(self, path: Path) -> Node | None:
        """The same as a node."""
        name = self.owner(path)
        return self.nodes[name] if name else None

    def sampler(self, rollouts: Path) -> Node | None:
        """The stage that sampled rollouts, whatever has filtered them since; None where it is none of the graph's."""
        node = self.maker(rollouts)
        while node is not None and "rollouts" in type(node.config).model_fields:
            node = self.maker(node.path("rollouts"))
        return node

    def origin(self, model: Path) -> tuple[Path, bool]:
        """The model that a model is made from through all stages of the run, with the same layers.

        And whether one of these stages gives it a score head.
        """
        chain: list[tuple[Path, bool]] = []
        while (found := self._origins.get(model)) is None:
            node = self.maker(model)
            start = node.stage.origin(node.config) if node else None
            if node is None or start is None:
                found = (model, False)
                break
            chain.append((model, node.stage.has_score_head(node.config)))
            model = start
        for made, gives_head in reversed(chain):
            found = self._origins[made] = (found[0], found[1] or gives_head)
        return found

    def known(self, what: Hashable, find: Callable[[], T | None]) -> T | None:
        """What `find` says, which is asked once; again only while it says that nothing is known yet."""
        if (found := self._known.get(what)) is None:
            found = self._known[what] = find()
        return found  # type: ignore[no-any-return]

    def by_urgency(self) -> list[Node]:
        """The stages, those first that the longest chain of others waits for: training before evaluation."""
        chain = dict.fromkeys(self.nodes, 0)
        for node in reversed(self.nodes.values()):
            for needed in node.needs:
                chain[needed] = max(chain[needed], chain[node.name] + 1)
        return sorted(self.nodes.values(), key=lambda node: -chain[node.name])


def folder_of(iteration: int) -> str:
    """The directory of an iteration in a run."""
    return f"iteration-{iteration:03d}"


def tag_of(iteration: int) -> str:
    """What an iteration's tag on the Hub is called."""
    return f"iteration-{iteration}"


def name_of(iteration: int | None, role: str) -> str:
    """The name of a node."""
    return role if iteration is None else f"{folder_of(iteration)}/{role}"
