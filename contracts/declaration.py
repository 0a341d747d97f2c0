"""What a stage is, said once: everything that others than the stage itself have to know of it. No torch, no vLLM.

A package declares its stages in the modules of `PACKAGE/stages/`. `python -m PACKAGE` finds them there, and so does the
driver, which imports no other part of the stage.
"""

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from contracts.config import StageConfig
from contracts.records import Schema

C = TypeVar("C", bound=StageConfig)


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One stage. What is beyond its fields, a stage says by overriding methods; the defaults are those of a small one.

    `run` and the like are named ("module:function"), not imported, so that a config is validated before torch or vLLM
    are loaded.
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
    environment: str = ""
    """The environment that it runs in; by default the one that is called as its package."""
    command: str = ""
    """What it is called on the command line, `python -m PACKAGE COMMAND`; by default its name."""

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

    def origin(self, config: C) -> Path | None:
        """The model that its output, a model, starts from and shares the layers with; None where there is none."""
        return None

    def has_score_head(self, config: C) -> bool:
        """Whether its output, a model, ends in one number instead of in the vocabulary."""
        return False


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
