"""The graph of a run: stages, and which of them need which others' outputs."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from contracts.config import Role, StageConfig, validate
from pipelines.config.executor import ExecutorSection
from pipelines.planning.placement import place_stage

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """One stage of a run."""

    name: str
    """Path of its output below the run directory, for example iteration-001/training."""
    package: str
    """Package that is run: python -m PACKAGE [SUBCOMMAND]."""
    subcommand: str | None
    environment: str
    config: StageConfig
    inputs: tuple[Path, ...] = field(compare=False)
    """All that it reads."""
    needs: tuple[str, ...] = field(compare=False)
    """Names of the nodes whose outputs it reads."""

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
        return ["-m", self.package, *([self.subcommand] if self.subcommand else [])]


class Graph:
    """Stages in the order in which they were added; an output is known by its path before it exists."""

    def __init__(self, directory: Path, executor: ExecutorSection | None = None) -> None:
        self.directory = directory
        self.executor = executor or ExecutorSection()
        self.nodes: dict[str, Node] = {}
        self._owners: dict[Path, str] = {}
        self._known: dict[Hashable, Any] = {}

    def add(
        self, name: str, kind: type[StageConfig], command: str, section: dict[str, Any] | None = None, /, **fields: Any
    ) -> Path:
        """Add a stage and return the path of its output, to be given to the stages that read it.

        Args:
            command: "PACKAGE" or "PACKAGE SUBCOMMAND".
            section: keys from the run's config; `fields`, which the driver knows, come on top.

        Raises:
            UserError: the stage's config refuses the values, or it cannot be spread over the devices it asks for.
        """
        output = self.directory / name
        config: StageConfig = validate(kind, {**(section or {}), **fields, "output": output}, f"stage {name}")
        config = place_stage(name, config, self.executor)
        package, _, subcommand = command.partition(" ")
        environment = ENVIRONMENTS[package]
        if name in self.nodes:
            raise ValueError(f"two stages are named {name}")
        inputs = tuple(input_paths(config))
        needs = tuple(dict.fromkeys(owner for path in inputs if (owner := self.owner(path))))
        self.nodes[name] = Node(name, package, subcommand or None, environment, config, inputs, needs)
        self._owners[output] = name
        return output

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


ENVIRONMENTS = {
    "contracts": "annotation",
    "annotation": "annotation",
    "generation": "generation",
    "training": "training",
    "embedded": "training",
}


def input_paths(config: StageConfig) -> list[Path]:
    """All inputs of a stage."""
    return _paths(config.select(Role.INPUT))


def _paths(value: Any) -> list[Path]:
    if isinstance(value, dict):
        return [path for item in value.values() for path in _paths(item)]
    if isinstance(value, list):
        return [path for item in value for path in _paths(item)]
    return [] if value is None else [Path(value)]
