"""What a stage is, said once: everything that others than the stage itself have to know of it. No torch, no vLLM.

A package declares its stages in the modules of `PACKAGE/stages/`. `python -m PACKAGE` finds them there, and so does the
driver, which imports no other part of the stage. docs/extending.md shows how to add one.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from contracts.config import StageConfig
from contracts.model_size import Size
from contracts.models import ModelInfo
from contracts.outlook import AnswerStats, Memory, Outlook, PairStats, RowStats
from contracts.records import Schema

C = TypeVar("C", bound=StageConfig)

Workload: TypeAlias = Literal["generation", "scoring", "training", "light"]
"""What a stage is to a scheduler. generation, scoring: any number of tasks share its shards; its config has `replicas`.
training: one job over one or several machines. light: one process, without a large model."""


@dataclass(frozen=True)
class ModelUse:
    """A model that a stage reads, and what it must be."""

    path: Path
    checks: tuple[Callable[[ModelInfo], None], ...] = ()
    """Each raises UserError where it is not."""
    of_layers: Callable[[Path], None] | None = None
    """The same for what is true of all models with these layers: asked of the directory of the model that it is trained
    from as well."""
    ids_of: Path | None = None
    """Rollouts whose token ids it is given: it must have the vocabulary of the policy that sampled them."""


@dataclass(frozen=True)
class ProcessLayout:
    """How a stage is spread over processes, one device each."""

    processes: int = 1
    nodes: int = 1
    """Machines that the processes are spread over."""
    fixed_nodes: bool = False
    """Whether the user has said how many machines."""
    shown: str = ""
    """The same in the config's words."""
    together: int = 1
    """Processes that talk to each other."""
    talk: str = ""
    """The keys by which processes talk to each other over the network, as in the config; empty where none do."""


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One stage. What is beyond its fields, a stage says by overriding methods; the defaults are those of a small one.

    Functions are named ("module:function"), not imported, so that a config is validated before torch or vLLM are
    loaded.
    """

    config: type[C]
    schema: Schema
    """What it publishes."""
    run: str
    """`run(config, context) -> Outcome`; see contracts/stage.py."""
    launch: str | None = None
    """`launch(config) -> bool`, asked before anything is written: whether it has run this stage to its end in
    processes of its own (True), or leaves it to this one."""
    helps: str | None = None
    """`helps(config) -> bool`: whether this process has nothing to do but `launch`, because the same command publishes
    on another machine."""
    preflight: str | None = None
    """`check(inspected) -> Iterator[Finding]`, run in its environment before the first stage of a run; see
    contracts/preflight.py."""
    environment: str = ""
    """The environment that it runs in; by default the one that is called as its package."""
    command: str = ""
    """What it is called on the command line, `python -m PACKAGE COMMAND`; by default its name."""
    conversations: str | None = None
    """The field of its config that names conversations of the user's, some of which preflight has rendered."""
    memory_fix: str = "Free memory, or take a smaller model."
    """What to do where its memory does not suffice."""

    def __post_init__(self) -> None:
        """Fill in what follows from the others."""
        object.__setattr__(self, "environment", self.environment or self.package)
        object.__setattr__(self, "command", self.command or self.name)

    @property
    def name(self) -> str:
        """As manifests name it."""
        return self.config.stage

    @property
    def package(self) -> str:
        """The package that it is in."""
        return self.run.partition(".")[0]

    # What it needs.

    def models(self, config: C) -> tuple[ModelUse, ...]:
        """The models that it reads; first the one that conversations are rendered for."""
        return ()

    def libraries(self, config: C) -> tuple[str, ...]:
        """What its environment must have."""
        return ()

    def memory(self, config: C, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """The memory that it takes; None for little, and where that cannot be known."""
        return None

    def published_bytes(self, config: C, outlook: Outlook) -> int | None:
        """Bytes that it publishes, rather too many than too few; None where that cannot be known."""
        return None

    def scratch_bytes(self, config: C, outlook: Outlook) -> int:
        """Bytes on the disk that it needs while it runs and gives back."""
        return 0

    # Where it runs.

    def workload(self, config: C) -> Workload:
        """What it is to a scheduler."""
        return "light"

    def gpus(self, config: C) -> int:
        """GPUs that one replica takes, where there are any."""
        return 1

    def layout(self, config: C) -> ProcessLayout:
        """How it is spread."""
        return ProcessLayout()

    def spread(self, config: C, devices: int, nodes: int | None = None) -> C:
        """The same stage over so many devices of one machine or of `nodes`, as far as the user has not said how many
        processes it has."""
        return config

    # What its output holds.

    def origin(self, config: C) -> Path | None:
        """The model that its output, a model, starts from and shares the layers with; None where there is none."""
        return None

    def has_score_head(self, config: C) -> bool:
        """Whether its output, a model, ends in one number instead of in the vocabulary."""
        return False

    def size(self, config: C) -> Size | None:
        """The measures of the model that it makes from none."""
        return None

    def rows(self, config: C, path: Path, outlook: Outlook) -> RowStats | None:
        """Prompts or demonstrations that it publishes at `path`."""
        return None

    def answers(self, config: C, outlook: Outlook) -> AnswerStats | None:
        """Answers that it publishes, or makes its rows of."""
        return None

    def pairs(self, config: C, outlook: Outlook) -> PairStats | None:
        """Preference pairs that it publishes."""
        return None

    def tokens(self, config: C) -> tuple[int, int] | None:
        """For a stage that samples: tokens of the longest prompt (0: no limit of its own) and of the longest answer."""
        return None

    def row_limit(self, config: C) -> int | None:
        """Tokens of prompt and answer beyond which it drops a row."""
        return None


def load(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


PACKAGES = ("contracts", "embedded", "generation", "annotation", "training")
"""Those that have stages."""


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
