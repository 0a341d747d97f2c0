"""Runs stages on this machine: each has a supervisor, a process of its own that ends with the driver.

With `executor.warm`, supervisors and the stages of locked environments are forked from processes that have imported
their libraries (pipelines/execution/warm.py), and started in the ordinary way if that is not possible.
"""

import os
import subprocess
from pathlib import Path

import msgspec

from contracts.forks import IMPORT_SECONDS, Process, fork
from contracts.manifest import MANIFEST
from contracts.versions import source_version
from pipelines.environments.launch import stage_environment
from pipelines.environments.paths import source_root
from pipelines.execution.attempts import stage_request, write_request
from pipelines.execution.executors.base import Executor, Job, Site, supervisor_command
from pipelines.execution.supervisor import RUN, AttemptRequest
from pipelines.execution.warm import WarmProcesses, devices_of
from pipelines.graph import Node, Placement
from pipelines.machine import gpu_count, host_memory
from pipelines.planning.cluster import default_threads
from pipelines.planning.estimates import memory
from pipelines.run.events import JobEnded

MIN_WARM_STAGES = 2
"""Minimum number of remaining stages with models for which a warm process is started."""
START_SECONDS = 5.0
"""Maximum time that a supervisor waits for a warm process to import."""
SUPERVISOR_PACKAGE = "pipelines"


def is_heavy(node: Node) -> bool:
    """Whether a stage loads a model, and therefore imports large libraries."""
    return bool(node.stage.models(node.config))


class LocalExecutor(Executor):
    """Starts each attempt in a process of its own, which ends with the driver."""

    kind = "local"

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._threads = default_threads(site.config.executor)
        self._warm = WarmProcesses(self.run.path / "logs" / "warm") if site.config.executor.warm else None
        self._heavy: dict[tuple[str, Placement | None], list[Node]] | None = None

    def close(self) -> None:
        """End the warm processes."""
        if self._warm is not None:
            self._warm.close()

    def submit(self, node: Node, attempt: Path) -> Job:
        """Start the attempt."""
        self.write_request(node, attempt)
        log = attempt / "supervisor.log"
        command = supervisor_command(attempt)
        with log.open("ab") as output:
            process: Process | None = None
            if self._warm is not None:
                path = self._warm.address(SUPERVISOR_PACKAGE, command[0], os.environ, os.getcwd())
                place = (os.environ, os.getcwd(), source_version(SUPERVISOR_PACKAGE), output)
                process = fork(path, command, *place, START_SECONDS)
            process = process or subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        return _ProcessJob(process, attempt, log)

    def write_request(self, node: Node, attempt: Path) -> None:
        """Write the attempt's request."""
        self._import_in_advance(node)
        request = stage_request(node, attempt, self.run.path, self.config, self._threads, here=True)
        write_request(node, attempt, self._with_warm_process(node, request))

    def _import_in_advance(self, started: Node) -> None:
        """Start importing the libraries of the stage being started, or of stages that depend on it directly.

        The imports thus run during the stage before the first that needs them, and stages that are never reached cost
        nothing.
        """
        if self._warm is None:
            return
        if self._heavy is None:
            self._heavy = {}
            for node in self.graph.nodes.values():
                if is_heavy(node) and self._can_preload(node):
                    self._heavy.setdefault((node.environment, _exclusive_placement(node)), []).append(node)
        for place, nodes in list(self._heavy.items()):
            if any(started.name in (node.name, *node.needs) for node in nodes):
                again = self.graph.depending_on(started.name)  # made before, but from what is being made anew
                left = [node for node in nodes if node.name in again or not (node.output / MANIFEST).is_file()]
                if len(left) >= MIN_WARM_STAGES:
                    where = (self.run.path, self.run.path, self.config, self._threads)
                    request = stage_request(left[0], *where, here=True)
                    libraries = {name for node in left for name in node.stage.libraries(node.config)}
                    self._address(left[0], request, libraries)
                del self._heavy[place]  # there will not be more stages later

    def _can_preload(self, node: Node) -> bool:
        """Whether a warm process can import the libraries of a stage's environment."""
        locked = self.config.environments.of(node.environment).is_locked
        return locked and (source_root() / node.environment / "preload.py").is_file()

    def _address(self, node: Node, request: AttemptRequest, libraries: set[str] | None = None) -> Path | None:
        """The socket of the warm process for a stage, or None; with `libraries` it is started if necessary."""
        assert self._warm is not None
        environment = {**stage_environment(request.environment), RUN: str(self.run.path)}
        if libraries is None and not self._warm.has(node.environment, request.argv[0], environment):
            return None
        place = (node.environment, request.argv[0], environment, request.directory)
        return self._warm.address(*place, sorted(libraries or ()))

    def _with_warm_process(self, node: Node, request: AttemptRequest) -> AttemptRequest:
        """The request with the warm process that the stage is forked from, if there is one."""
        if self._warm is None or not self._can_preload(node):
            return request
        path = self._address(node, request)
        if path is None:
            return request
        self._free_memory(node, request)
        return msgspec.structs.replace(
            request,
            warm=str(path),
            warm_source=source_version(node.environment),
            warm_seconds=IMPORT_SECONDS if node.stage.libraries(node.config) else 0.0,
            label=node.stage.label(node.config),
        )

    def _free_memory(self, node: Node, request: AttemptRequest) -> None:
        """Have warm processes free the memory that the stage needs and that models of other stages hold."""
        assert self._warm is not None
        if not is_heavy(node):
            return
        on_gpu = gpu_count() > 0
        need = None if on_gpu else memory(node, self.graph, on_gpu=False)
        if on_gpu or (need is not None and need.total * need.processes > host_memory()):
            self._warm.release(devices_of(request.environment), node.stage.label(node.config))


def _exclusive_placement(node: Node) -> Placement | None:
    """The placement of a stage that sees GPUs of its own, which a warm process for it must see as well."""
    return node.placement if node.placement is not None and node.placement.exclusive and gpu_count() else None


class LocalJob:
    """A supervisor on this machine. It is asked to end by a file."""

    pid: int | None = None

    def __init__(self, attempt: Path) -> None:
        self._attempt = attempt

    def news(self) -> str | None:
        """Return None: a supervisor here starts at once."""
        return None

    def clear(self) -> list[JobEnded]:
        """Nothing to delete or report."""
        return []

    def cancel(self) -> None:
        """Ask the supervisor to end, even if the logs were deleted meanwhile."""
        self._attempt.mkdir(parents=True, exist_ok=True)
        (self._attempt / "cancel").touch()


class _ProcessJob(LocalJob):
    def __init__(self, process: Process, attempt: Path, log: Path) -> None:
        super().__init__(attempt)
        self._process = process
        self._log = log
        self.pid = process.pid

    def ended(self) -> bool:
        return self._process.poll() is not None

    def clear(self) -> list[JobEnded]:
        if (self._attempt / "exit.json").exists():  # otherwise its log is the only explanation
            self._log.unlink(missing_ok=True)
        return []
