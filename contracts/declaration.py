"""Declares stages: everything that the driver, `doctor` and schedulers need to know about a stage, without torch.

A package declares its stages in the modules of `PACKAGE/stages/`. `python -m PACKAGE` finds them there, and so does the
driver, which imports nothing else of the stage. docs/extending.md shows how to add one.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from contracts.config import StageConfig
from contracts.model_size import Size
from contracts.models import ModelInfo
from contracts.operations import Operations
from contracts.outlook import AnswerStats, Memory, Outlook, PairStats, RowStats
from contracts.records import Schema

C = TypeVar("C", bound=StageConfig)

Workload: TypeAlias = Literal["generation", "scoring", "training", "light"]
"""How a stage is scheduled. generation, scoring: any number of tasks share its shards; its config has `replicas`.
training: one job on one or several nodes. light: one process without a large model."""


@dataclass(frozen=True)
class ModelUse:
    """A model that a stage reads, and what the stage requires of it."""

    path: Path
    checks: tuple[Callable[[ModelInfo], None], ...] = ()
    """Requirements: functions that raise UserError if the model does not meet them."""
    check_architecture: Callable[[Path], None] | None = None
    """A check of the architecture alone, so that it can also be applied to the model that this one is trained from."""
    ids_of: Path | None = None
    """Rollouts whose token ids the model reads: its vocabulary must be that of the policy that sampled them."""


@dataclass(frozen=True)
class ProcessLayout:
    """How a stage is distributed over processes, one device each."""

    processes: int = 1
    nodes: int = 1
    """Machines (nodes) that the processes run on."""
    fixed_nodes: bool = False
    """Whether the user's config sets the number of nodes."""
    shown: str = ""
    """The layout in the config's keys, for messages."""
    group_size: int = 1
    """Processes that communicate at every layer (tensor, pipeline or sequence parallel)."""
    network_keys: str = ""
    """The config keys of the communication over the network; empty if there is none."""


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One stage. A stage overrides the methods that apply to it; the defaults suit a light stage.

    Functions are given by name ("module:function"), so that a config is validated before torch or vLLM is imported.
    """

    config: type[C]
    schema: Schema
    """Schema of the published artifact."""
    run: str
    """`run(config, context) -> Outcome`; see contracts/stage.py."""
    launch: str | None = None
    """`launch(config) -> bool`, called before anything is written: True if it has run the whole stage in worker
    processes, False if this process is to run it."""
    is_worker_node: str | None = None
    """`is_worker_node(config) -> bool`: whether this process only calls `launch`, because the same command on another
    node publishes."""
    preflight: str | None = None
    """`check(inspected) -> Iterator[Finding]`, run in the stage's environment before the first stage of a run; see
    contracts/preflight.py."""
    environment: str = ""
    """Name of the stage's environment; default: its package."""
    command: str = ""
    """Name of the stage on the command line, `python -m PACKAGE COMMAND`; default: its name in manifests."""
    conversations: str | None = None
    """The config field with the path of the user's conversations, some of which preflight renders."""
    step_log: str = ""
    """For training stages: the published file with the metrics of every optimizer step, one JSON object per line."""
    layout_keys: tuple[str, ...] = ()
    """Keys of `placement.stages.KEY.layout` that the stage supports; see `with_layout`."""
    memory_fix: str = "Free memory, or take a smaller model."
    """Advice for the case that the stage does not fit into memory."""

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other fields."""
        object.__setattr__(self, "environment", self.environment or self.package)
        object.__setattr__(self, "command", self.command or self.name)

    @property
    def name(self) -> str:
        """Name of the stage in manifests."""
        return self.config.stage

    @property
    def package(self) -> str:
        """The package that implements the stage."""
        return self.run.partition(".")[0]

    # Its requirements.

    def models(self, config: C) -> tuple[ModelUse, ...]:
        """The models that the stage reads; conversations are rendered for the first."""
        return ()

    def libraries(self, config: C) -> tuple[str, ...]:
        """Packages that its environment must have."""
        return ()

    def memory(self, config: C, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """Estimated memory; None if it is small or unknown."""
        return None

    def operations(self, config: C, outlook: Outlook, *, on_gpu: bool) -> Operations | None:
        """The planned computation with the stage's model; None if it has none, or too little is known."""
        return None

    def published_bytes(self, config: C, outlook: Outlook) -> int | None:
        """Estimated size of the output in bytes, rounded up; None if unknown."""
        return None

    def scratch_bytes(self, config: C, outlook: Outlook) -> int:
        """Temporary disk space in bytes, freed when the stage ends."""
        return 0

    # Where it runs.

    def follows(self, config: C) -> str | None:
        """The field of an input whose shards the stage can read while that input is still being produced, if any.

        Such a stage computes one shard from each shard of that input, which it reads through
        `contracts.following.Source` and distributes with `contracts.workers.share_shards`; it writes any other files
        afterwards.
        """
        return None

    def workload(self, config: C) -> Workload:
        """The kind of scheduling that the stage needs."""
        return "light"

    def uses_devices(self, config: C) -> bool:
        """Whether the stage computes on its devices, so that no other stage may use them at the same time; if not, it
        runs next to stages that do."""
        return self.workload(config) != "light"

    def gpus(self, config: C) -> int:
        """GPUs per replica, on machines that have GPUs."""
        return 1

    def layout(self, config: C) -> ProcessLayout:
        """The stage's distribution over processes."""
        return ProcessLayout()

    def spread(self, config: C, devices: int, nodes: int | None = None) -> C:
        """The config for `devices` devices in total, on one machine or on `nodes`, unless the user's config sets the
        number of processes."""
        return config

    def with_layout(self, config: C, sizes: Mapping[str, Any]) -> C:
        """The config with the given layout sizes, by names in `layout_keys`.

        Raises:
            UserError: the sizes are incompatible.
        """
        return config

    def label(self, config: C) -> str:
        """Stages with the same label can run one after another in a process that keeps what they load
        (contracts/resident.py); empty if nothing is worth keeping."""
        return ""

    # Its output.

    def origin(self, config: C) -> Path | None:
        """For an output that is a model: the model that it is trained from, whose architecture it has; else None."""
        return None

    def has_score_head(self, config: C) -> bool:
        """Whether its output (a model) has a score head with one output instead of an LM head."""
        return False

    def size(self, config: C) -> Size | None:
        """Size of the model that the stage creates from scratch."""
        return None

    def rows(self, config: C, path: Path, outlook: Outlook) -> RowStats | None:
        """Estimate of the prompts or demonstrations that the stage publishes at `path`."""
        return None

    def answers(self, config: C, outlook: Outlook) -> AnswerStats | None:
        """Estimate of the answers that the stage publishes, or builds its rows from."""
        return None

    def pairs(self, config: C, outlook: Outlook) -> PairStats | None:
        """Estimate of the preference pairs that the stage publishes."""
        return None

    def tokens(self, config: C) -> tuple[int, int] | None:
        """For a stage that samples: maximum tokens of a prompt (0: no limit of its own) and of an answer."""
        return None

    def row_limit(self, config: C) -> int | None:
        """Maximum tokens of prompt plus answer; longer rows are dropped."""
        return None


def load(name: str) -> Callable[..., Any]:
    """Import the function that "module:function" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


PACKAGES = ("contracts", "embedded", "generation", "annotation", "training")
"""The packages that declare stages."""


@functools.cache
def all_stages() -> dict[str, Stage[Any]]:
    """The stages of all packages, by name."""
    return {stage.name: stage for package in PACKAGES for stage in stages_of(package).values()}


def stages_of(package: str) -> dict[str, Stage[Any]]:
    """The stages that a package declares, by command."""
    folder = importlib.import_module(f"{package}.stages")
    names = [module.name for module in pkgutil.iter_modules(folder.__path__, f"{package}.stages.")]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    return {value.command: value for value in values if isinstance(value, Stage)}
