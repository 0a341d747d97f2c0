"""What an executor is to the rest of Ratchet. Each is a module (or package) of this folder, named as its `kind`.

An executor starts `supervise` for an attempt at a stage, somewhere, and sees when that has ended. Everything else is
on the disk: what to run (request.json), how it ended, what is published. So a scheduler takes one file here: a
subclass of `Executor` that submits `supervisor_command(attempt)` and asks whether it still runs. docs/extending.md
shows one.
"""

import importlib
import importlib.util
import shlex
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from contracts.errors import RunStoppedError, UserError

if TYPE_CHECKING:  # jobs on a cluster import this module, and as little else as they can
    from rich.console import Console

    from pipelines.config.executor import StageSection
    from pipelines.config.run import RunConfig
    from pipelines.execution.listeners import Listen
    from pipelines.graph import Graph, Node
    from pipelines.run.directory import RunDirectory
    from pipelines.run.events import JobEnded
    from pipelines.run.verdicts import Verdict


class Job(Protocol):
    """A submitted supervisor."""

    @property
    def pid(self) -> int | None:
        """The process on this machine with which it ends; None where there is none."""
        ...

    def ended(self) -> bool:
        """Whether it runs no more, however it ended."""
        ...

    def news(self) -> str | None:
        """Why it does not run yet, where that is not only for a while; told whenever it changes."""
        ...

    def clear(self) -> "list[JobEnded]":
        """After the end: delete what the executor needed; what it has printed goes to the attempt's logs.

        Returns:
            What happened to it on the way that the run's report is to tell.
        """
        ...

    def cancel(self) -> None:
        """Ask it to end soon."""
        ...


class Observation(Protocol):
    """What an executor's jobs of a run do at this moment, for readers."""

    @property
    def error(self) -> str | None:
        """Why nothing is known of them, where the scheduler does not answer."""
        ...

    @property
    def jobs(self) -> int:
        """How many have not ended."""
        ...

    def works_on(self, stage: str) -> bool:
        """Whether a job of the stage has not ended."""
        ...

    def submitted(self, stage: str) -> bool:
        """Whether the latest attempt at a stage was handed to this executor."""
        ...

    def state(self, stage: str, progress: str | None) -> tuple[str, str] | None:
        """State and detail of a stage whose jobs have not ended, or of which nothing is known; None: it has none."""
        ...

    def unbegun(self, stage: str) -> tuple[str, str] | None:
        """The same of a stage whose latest job has ended before its supervisor began."""
        ...

    def unheard(self) -> "list[JobEnded]":
        """What happened to jobs of which nobody has taken note yet.

        Raises:
            UserError: the scheduler's accounting does not answer.
        """
        ...


class JobTask(Protocol):
    """What a job does on its nodes, where that is more than to supervise an attempt."""

    module: ClassVar[str]
    """The module whose `perform(task, entry)` does it."""


@dataclass(frozen=True)
class Entry:
    """What lies above the executors and is handed down to them: see pipelines/job.py."""

    perform: Callable[[JobTask], None]
    """The function that a job runs."""
    listeners: "Callable[[RunDirectory, Graph], list[Listen]]"
    """Makes those who are told what a job records."""


@dataclass(frozen=True)
class Site:
    """What an executor works for."""

    run: "RunDirectory"
    graph: "Graph"
    config: "RunConfig"
    entry: Entry | None = None
    """None where nothing is submitted: for readers."""


class Executor(ABC):
    """Starts supervisors of one kind, for one run. All but `submit` can stay as it is here."""

    kind: ClassVar[str]
    """Its name: that of its module."""
    outlives_driver: ClassVar[bool] = False
    """Whether its jobs go on when the driver has ended; the next command adopts them."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.run, self.graph, self.config = site.run, site.graph, site.config

    def entry(self, node: "Node") -> "StageSection":
        """What the config asks of the executor for a stage: cores, GPUs, memory, time."""
        return self.config.executor.entry(node)

    @abstractmethod
    def submit(self, node: "Node", attempt: Path) -> Job:
        """Write the request into the attempt's directory, and have `supervise(attempt)` run, here or elsewhere."""

    def adopt(self, node: "Node", key: str) -> Job | None:
        """The stage's latest attempt, if an earlier command began it under this key and it still goes on."""
        return None

    def check(self) -> None:  # noqa: B027
        """Before anything starts: raise UserError where this cannot run the stages that are to run here."""

    def recover(self) -> None:  # noqa: B027
        """Before a driver starts: see to what earlier commands have left."""

    def close(self) -> None:  # noqa: B027
        """After a driver's end: delete what is no longer needed."""

    def detach(self, console: "Console", plan: "dict[str, Verdict]") -> None:
        """Have all stages of `plan` that are to run go on by themselves, without a driver."""
        raise UserError(f"executor {self.kind} has no detached runs. Leave --detach out.")

    def require_no_detached_run(self, *, same_settings: bool) -> None:  # noqa: B027
        """Raise UserError where the run goes on by itself already; with `same_settings` one with the same may."""

    def write_dry_run(self, console: "Console", plan: "dict[str, Verdict]", *, detached: bool) -> None:  # noqa: B027
        """Write what would be submitted."""

    def observe(self, patience: float) -> Observation | None:
        """What the run's jobs do; None where there are none that a driver does not see by itself.

        Args:
            patience: seconds for which a scheduler that does not answer is asked again.
        """
        return None

    def logs(self, attempt: Path) -> list[Path]:
        """What the jobs of an attempt have printed themselves."""
        return []

    def cancel(self) -> list[str]:
        """End all jobs of the run; returns their ids."""
        return []


class Executors:
    """The executors of a run, each made when it is needed first."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._made: dict[str, Executor] = {}

    def named(self, kind: str) -> Executor:
        """The executor of a kind."""
        if kind not in self._made:
            self._made[kind] = executor_class(kind)(self.site)
        return self._made[kind]

    def of(self, node: "Node") -> Executor:
        """Where a stage runs."""
        return self.named(str(self.site.config.executor.entry(node).kind))

    def used(self) -> list[Executor]:
        """Every executor that a stage of the run needs, in the order of the stages."""
        return list(dict.fromkeys(self.of(node) for node in self.site.graph.nodes.values()))

    def lasting(self) -> Iterator[Executor]:
        """Every executor there is whose jobs outlive a driver: an earlier command may have used it."""
        from pipelines.config.executor import EXECUTORS

        return (self.named(kind) for kind in EXECUTORS if executor_class(kind).outlives_driver)

    def require_detachable(self, plan: "dict[str, Verdict]") -> None:
        """Check that all that is to run can do so where no process stays.

        Raises:
            UserError: a stage takes a driver.
            RunStoppedError: a gate has stopped the run.
        """
        from pipelines.run.gates import stop_of
        from pipelines.run.verdicts import reused

        if self.site.config.placement.streaming:
            raise UserError(
                "placement.streaming is true: a stage starts on the shards of another that still runs, which takes a "
                "driver. The jobs of a detached run wait until those before them have ended. Set "
                "placement.streaming=false, or leave --detach out."
            )
        if (stop := stop_of(self.site.graph, reused(plan))) is not None:
            raise RunStoppedError(stop.reason or "")
        for node in self.site.graph.nodes.values():
            if not plan[node.name].reuse and not (executor := self.of(node)).outlives_driver:
                raise UserError(
                    f"stage {node.name} runs on the executor {executor.kind}, which needs a process that stays: with "
                    "--detach all stages run on a scheduler. Set executor.stages so that it does too, or leave "
                    "--detach out."
                )

    def made(self) -> list[Executor]:
        """Those that were needed so far."""
        return list(self._made.values())


def executor_class(kind: str) -> type[Executor]:
    """The executor of a kind, of those that the config knows; of a package it is in the module `executor`."""
    name = f"{__package__}.{kind}"
    spec = importlib.util.find_spec(name)
    module = importlib.import_module(f"{name}.executor" if spec and spec.submodule_search_locations else name)
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Executor)]
    return next(value for value in classes if getattr(value, "kind", None) == kind)


def output_of(command: list[str], text: str = "") -> str:
    """What a scheduler's command prints, given some text to read.

    Raises:
        UserError: it is not on PATH, or it failed; with what it says.
    """
    try:
        result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        where = "Start from a node of the cluster, or set executor=local."
        raise UserError(f"{command[0]} is not on PATH. {where}") from error
    if result.returncode:
        said = "; ".join((result.stderr.strip() or result.stdout.strip()).splitlines())
        raise UserError(f"`{shlex.join(command)}` failed with exit code {result.returncode}: {said}")
    return result.stdout.strip()


def supervisor_command(attempt: Path) -> list[str]:
    """The command that runs an attempt, on any machine that sees the run's directory."""
    return [sys.executable, "-P", "-m", "pipelines.execution.supervisor", str(attempt)]
