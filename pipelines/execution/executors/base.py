"""The interface of executors. Each is a module or package of this folder, named as its `kind`.

An executor starts `supervise` for an attempt at a stage on some machine and detects its end. Everything else is on
disk: the request (request.json), the outcome, the published artifact. Supporting another scheduler therefore takes one
file here: a subclass of `Executor` that submits `supervisor_command(attempt)` and asks whether it still runs; see
docs/extending.md for an example.
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
        """The process on this machine that the job ends with; None if there is none."""
        ...

    def ended(self) -> bool:
        """Whether the job has ended, in success or failure."""
        ...

    def news(self) -> str | None:
        """The reason why the job has not started, if that may last; None if it has not changed since the last call."""
        ...

    def clear(self) -> "list[JobEnded]":
        """After the job's end, delete what the executor needed for it, and keep its output in the attempt's logs.

        Returns:
            Events during the job's life that the run's report shows.
        """
        ...

    def cancel(self) -> None:
        """Ask the job to end soon."""
        ...


class Observation(Protocol):
    """A snapshot of an executor's jobs for a run, for commands that show them."""

    @property
    def error(self) -> str | None:
        """The reason why the state is unknown, if the scheduler does not answer."""
        ...

    @property
    def jobs(self) -> int:
        """Number of jobs that have not ended."""
        ...

    def works_on(self, stage: str) -> bool:
        """Whether a job of the stage has not ended."""
        ...

    def submitted(self, stage: str) -> bool:
        """Whether the latest attempt at a stage was submitted to this executor."""
        ...

    def state(self, stage: str, progress: str | None) -> tuple[str, str] | None:
        """State and detail of a stage whose jobs have not ended or are in an unknown state; None if it has none."""
        ...

    def ended_before_start(self, stage: str) -> tuple[str, str] | None:
        """State and detail of a stage whose latest job ended before its supervisor began."""
        ...

    def unrecorded_events(self) -> "list[JobEnded]":
        """Events of ended jobs that are not recorded yet.

        Raises:
            UserError: the scheduler's accounting does not answer.
        """
        ...


class JobTask(Protocol):
    """A job's work on its nodes, for executors whose jobs do more than supervise an attempt."""

    module: ClassVar[str]
    """The module whose `perform(task, entry)` does the work."""


@dataclass(frozen=True)
class JobEntry:
    """Functions of the layers above the executors, passed down to them; see pipelines/job.py."""

    perform: Callable[[JobTask], None]
    """The function that a job runs."""
    listeners: "Callable[[RunDirectory, Graph], list[Listen]]"
    """Creates the listeners for what a job records."""


@dataclass(frozen=True)
class Site:
    """The run that an executor works for."""

    run: "RunDirectory"
    graph: "Graph"
    config: "RunConfig"
    entry: JobEntry | None = None
    """None for readers, which submit nothing."""


class Executor(ABC):
    """Starts supervisors of one kind for one run. Subclasses have to define `submit` only."""

    kind: ClassVar[str]
    """Name of the executor and of its module."""
    outlives_driver: ClassVar[bool] = False
    """Whether its jobs continue after the driver has ended; the next command adopts them."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.run, self.graph, self.config = site.run, site.graph, site.config

    def entry(self, node: "Node") -> "StageSection":
        """The resources that the config requests for a stage: cores, GPUs, memory, time."""
        return self.config.executor.entry(node)

    @abstractmethod
    def submit(self, node: "Node", attempt: Path) -> Job:
        """Write the request into the attempt's directory, and have `supervise(attempt)` run on some machine."""

    def adopt(self, node: "Node", key: str) -> Job | None:
        """The stage's latest attempt, if an earlier command began it under this key and it has not ended."""
        return None

    def check(self) -> None:  # noqa: B027
        """Raise UserError if this executor cannot run the stages assigned to it; called before anything starts."""

    def recover(self) -> None:  # noqa: B027
        """Clean up what earlier commands left; called before a driver starts."""

    def close(self) -> None:  # noqa: B027
        """Delete what is no longer needed; called after a driver's end."""

    def detach(self, console: "Console", plan: "dict[str, Verdict]") -> None:
        """Submit all stages of `plan` that have to run, so that they continue without a driver."""
        raise UserError(f"executor {self.kind} does not support detached runs. Leave --detach out.")

    def require_no_detached_run(self, *, same_settings: bool) -> None:  # noqa: B027
        """Raise UserError if the run is detached already; with `same_settings`, only if its settings differ."""

    def write_dry_run(self, console: "Console", plan: "dict[str, Verdict]", *, detached: bool) -> None:  # noqa: B027
        """Write what would be submitted."""

    def observe(self, patience: float) -> Observation | None:
        """The state of the run's jobs; None if the executor has none that outlive a driver.

        Args:
            patience: how many seconds to keep asking a scheduler that does not answer.
        """
        return None

    def logs(self, attempt: Path) -> list[Path]:
        """Files with the output of an attempt's jobs outside the stage's own log."""
        return []

    def cancel(self) -> list[str]:
        """End all jobs of the run. Returns their ids."""
        return []


class Executors:
    """The executors of a run, each created on first use."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._made: dict[str, Executor] = {}

    def of_kind(self, kind: str) -> Executor:
        """The executor of a kind."""
        if kind not in self._made:
            self._made[kind] = executor_class(kind)(self.site)
        return self._made[kind]

    def of(self, node: "Node") -> Executor:
        """The executor that a stage runs on."""
        return self.of_kind(str(self.site.config.executor.entry(node).kind))

    def used(self) -> list[Executor]:
        """The executors that the stages of the run need, in the order of the stages."""
        return list(dict.fromkeys(self.of(node) for node in self.site.graph.nodes.values()))

    def outliving_drivers(self) -> Iterator[Executor]:
        """All executors whose jobs outlive a driver: an earlier command may have used any of them."""
        from pipelines.config.executor import EXECUTORS

        return (self.of_kind(kind) for kind in EXECUTORS if executor_class(kind).outlives_driver)

    def require_detachable(self, plan: "dict[str, Verdict]") -> None:
        """Check that all stages that have to run can do so without a driver.

        Raises:
            UserError: a stage needs a driver.
            RunStoppedError: a gate has stopped the run.
        """
        from pipelines.run.gates import stop_decision
        from pipelines.run.verdicts import reused

        if self.site.config.placement.streaming:
            raise UserError(
                "placement.streaming is true: a stage starts on the shards of another that still runs, which takes a "
                "driver. The jobs of a detached run wait until those before them have ended. Set "
                "placement.streaming=false, or leave --detach out."
            )
        if (stop := stop_decision(self.site.graph, reused(plan))) is not None:
            raise RunStoppedError(stop.reason or "")
        for node in self.site.graph.nodes.values():
            if not plan[node.name].reuse and not (executor := self.of(node)).outlives_driver:
                raise UserError(
                    f"stage {node.name} runs on the executor {executor.kind}, which needs a process that stays: with "
                    "--detach all stages run on a scheduler. Set executor.stages so that it does too, or leave "
                    "--detach out."
                )

    def created(self) -> list[Executor]:
        """The executors created so far."""
        return list(self._made.values())


def executor_class(kind: str) -> type[Executor]:
    """The executor class of a kind that the config accepts; if the kind is a package, from its module `executor`."""
    name = f"{__package__}.{kind}"
    spec = importlib.util.find_spec(name)
    module = importlib.import_module(f"{name}.executor" if spec and spec.submodule_search_locations else name)
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Executor)]
    return next(value for value in classes if getattr(value, "kind", None) == kind)


def output_of(command: list[str], text: str = "") -> str:
    """Standard output of a scheduler's command, given `text` as its standard input.

    Raises:
        UserError: it is not on PATH, or it failed; the message has its output.
    """
    try:
        result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        where = "Start from a node of the cluster, or set executor=local."
        raise UserError(f"{command[0]} is not on PATH. {where}") from error
    if result.returncode:
        message = "; ".join((result.stderr.strip() or result.stdout.strip()).splitlines())
        raise UserError(f"`{shlex.join(command)}` failed with exit code {result.returncode}: {message}")
    return result.stdout.strip()


def supervisor_command(attempt: Path) -> list[str]:
    """The command that runs an attempt on any machine that sees the run's directory."""
    return [sys.executable, "-P", "-m", "pipelines.execution.supervisor", str(attempt)]
