"""The graph of a run: stages, and which of them need which others' outputs."""

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
    """Devices that a stage is given."""

    executor: str
    """What it runs on, and so whose devices."""
    devices: tuple[int, ...]
    """Counted from 0; none: it computes beside those that have some."""
    pool: str = ""
    """Their pool, where the plan has several."""
    exclusive: bool = False
    """Whether it sees these alone, and nobody else computes on them at the time."""
    partition: str | None = None
    """Where a scheduler is to run it."""
    nodes: str | None = None
    """The nodes of a scheduler's cluster that it is to run on, as the scheduler writes them."""

    @functools.cached_property
    def bits(self) -> int:
        """A number with bit 1 + d for each device d; bit 0 for stages that are given none."""
        return sum(2 << device for device in self.devices) or 1


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
    """Names of the nodes that it waits for: those whose outputs it reads, and gates."""
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
        self.lag = 0
        """How many policies before the last one further iterations sample from at most."""
        self.gates: dict[int, str] = {}
        """The stage that decides whether an iteration may begin, for those that have one."""
        self.rollbacks: dict[str, int] = {}
        """Such stages that have taken the run back, by what is published, and the iteration that it goes on from."""
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
        after: str | None = None,
    ) -> Path:
        """Add a stage and return the path of its output, to be given to the stages that read it.

        Args:
            stage: its declaration.
            role: what it is for, and so its place in the iteration's directory; in the run's, where it has none.
            fields: of its config, without `output`.
            iteration: the one that it belongs to, if any.
            environment: what it runs in, if not in what stages of its kind do.
            after: a stage that it waits for without reading it, beside the one in `gates`.

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
        needs = tuple(dict.fromkeys([*(owner for path in inputs if (owner := self.owner(path))), *waits]))
        self.nodes[name] = Node(name, stage, config, inputs, needs, iteration, role, environment or stage.environment)
        self._owners[output] = name
        return output

    def with_nodes(self, nodes: dict[str, Node]) -> "Graph":
        """The same graph with nodes that differ in nothing that decides what they compute."""
        other = copy.copy(self)  # with all that is known of paths
        other.nodes = nodes
        return other

    def become(self, other: "Graph") -> None:
        """Take over all of another graph, for whoever has this one."""
        vars(self).update(vars(other))

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

    def followed(self, node: "Node") -> "Node | None":
        """The stage whose shards a stage can read while it still runs; None where it can follow none."""
        field = node.stage.follows(node.config)
        maker = None if field is None else self.maker(node.path(field))
        return maker if maker is not None and field is not None and maker.output == node.path(field) else None

    def sampler(self, rollouts: Path) -> Node | None:
        """The stage that sampled rollouts, whatever has filtered them since; None where it is none of the graph's."""
        node = self.maker(rollouts)
        while node is not None:
            if "rollouts" in type(node.config).model_fields:
                node = self.maker(node.path("rollouts"))
            elif "rounds" in type(node.config).model_fields:
                node = self.maker(node.config.model_dump()["rounds"][0])
            else:
                break
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


def sampled_from(iteration: int, lag: int) -> int:
    """The iteration whose policy another one samples from; 0 is the initial policy."""
    return max(0, iteration - 1 - lag)


def name_of(iteration: int | None, role: str) -> str:
    """The name of a node."""
    return role if iteration is None else f"{folder_of(iteration)}/{role}"
