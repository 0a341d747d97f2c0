"""The driver: runs a graph's stages as soon as their inputs are published, each at most once."""

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import msgspec
import yaml

from contracts.artifacts import MANIFEST, Artifact, write_atomically
from contracts.errors import UserError
from contracts.stage import require_space
from pipelines.config import RunConfig
from pipelines.decisions import decide, drop_partials, make_room
from pipelines.display import Display
from pipelines.environments import launch_command, probe_versions
from pipelines.executors import Running, make_executor
from pipelines.graph import Graph, Node
from pipelines.placement import gpu_count
from pipelines.report import write_metrics
from pipelines.rundir import RunDirectory
from pipelines.supervisor import Request, end_orphans, ending_of, failure_of, process_identity

POLL_SECONDS = 0.1
END_SECONDS = 20.0


class StageFailedError(Exception):
    """A stage ended without publishing."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Driver:
    """Drives one run. Its state is what is on the disk: killed at any instant, the same command continues."""

    def __init__(self, run: RunDirectory, graph: Graph, config: RunConfig, display: Display) -> None:
        self.run = run
        self.graph = graph
        self.order = graph.by_urgency()
        self.config = config
        self.display = display
        self.executor = make_executor(config.executor.kind)
        self.parallel = config.executor.parallel or default_parallel()
        self.published: set[str] = set()
        self.running: dict[str, Running] = {}
        self.ran = 0

    def drive(self) -> int:
        """Publish every stage of the graph; returns how many had to be run.

        Raises:
            UserError: a stage found a mistake of the user's.
            StageFailedError: a stage failed otherwise.
        """
        for pid in end_orphans(self.run.path):
            self.run.record("orphan ended", pid=pid)
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            while len(self.published) < len(self.graph.nodes):
                self.start_ready()
                self.collect_ended()
                self.display.refresh(self.running)
                time.sleep(POLL_SECONDS)
        finally:
            self.end_running()
        return self.ran

    def start_ready(self) -> None:
        """Reuse or start the stages whose inputs are published, the most urgent first, as many as may run."""
        for node in self.order:
            if node.name in self.published or node.name in self.running:
                continue
            if not self.published.issuperset(node.needs):
                continue
            if len(self.running) >= self.parallel:
                return
            self.reuse_or_start(node)

    def reuse_or_start(self, node: Node) -> None:
        """Decide about one stage and act on it."""
        environment = getattr(self.config.environments, node.environment)
        decision = decide(node, probe_versions(environment, node.environment))
        if not decision.reuse:
            decision = make_room(node, decision, self.run.path)
        if decision.reuse:
            self.published.add(node.name)
            self.display.reused(node, decision.reason)
            self.publish_metrics(node)
            return
        attempt = self.run.new_attempt(node.name)
        self.write_request(node, attempt)
        self.running[node.name] = Running(node, attempt, self.executor.submit(node.name, attempt))
        self.run.record("started", stage=node.name, reason=decision.reason, key=decision.key, attempt=attempt.name)
        self.display.started(node, decision.reason)

    def write_request(self, node: Node, attempt: Path) -> None:
        """Write the stage's config and command line into the attempt's directory."""
        config = attempt / "stage.yaml"
        write_atomically(config, yaml.safe_dump(node.config.model_dump(mode="json"), sort_keys=False).encode())
        environment = getattr(self.config.environments, node.environment)
        argv, variables = launch_command(environment, node.environment, [*node.argv, "--config", str(config)])
        threads = max(1, (os.cpu_count() or 1) // self.parallel)
        variables.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(threads)))
        # submitit's local executor hides the GPUs unless it is told their number.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            variables["CUDA_VISIBLE_DEVICES"] = visible
        request = Request(
            argv=argv,
            environment=variables,
            unset=[] if visible is not None else ["CUDA_VISIBLE_DEVICES"],
            directory=os.getcwd(),
            run=str(self.run.path),
            driver=process_identity(os.getpid()),
        )
        write_atomically(attempt / "request.json", msgspec.json.encode(request))

    def collect_ended(self) -> None:
        """Take note of stages that have ended; the first failure stops the run."""
        for running in list(self.running.values()):
            if not running.job.ended():
                continue
            del self.running[running.node.name]
            if not (running.node.output / MANIFEST).is_file():
                self.fail(running)
            self.ran += 1
            self.published.add(running.node.name)
            drop_partials(running.node)
            artifact = Artifact.open(running.node.output)
            self.run.record("published", stage=running.node.name, key=artifact.manifest.key)
            self.display.published(running.node, artifact)
            self.publish_metrics(running.node)

    def publish_metrics(self, node: Node) -> None:
        """After an evaluation: write metrics.jsonl anew from the evaluations published so far."""
        if node.config.stage == "evaluation":
            write_metrics(self.run.path, self.graph)

    def fail(self, running: Running) -> None:
        """Stop the run with what the stage left as its reason."""
        name, log = running.node.name, running.attempt / "stage.log"
        self.run.record("failed", stage=name, attempt=running.attempt.name)
        self.display.failed(running.node)
        require_space(self.run.path, "directory")
        failure = failure_of(running.attempt)
        program = ["python", "-m", "pipelines"] if sys.argv[0].endswith("__main__.py") else [sys.argv[0]]
        resume = f"Then continue with: {shlex.join([*program, *sys.argv[1:]])}"
        if failure is not None and failure["kind"] == "user":
            raise UserError(f"stage {name}: {failure['text']}\n  log: {log}\n  {resume}")
        reason = failure["text"] if failure else tail(log)
        how = ending_of(running.attempt)
        raise StageFailedError(f"stage {name} {how}\n{reason.rstrip()}\n  log: {log}\n  {resume}", 1)

    def end_running(self) -> None:
        """End the stages that still run: after a failure or an interrupt. What they published in part is kept."""
        for running in self.running.values():
            (running.attempt / "cancel").touch()
        deadline = time.monotonic() + END_SECONDS
        while any(not running.job.ended() for running in self.running.values()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if self.running:
            end_orphans(self.run.path)


def default_parallel() -> int:
    """Stages at once: one where GPUs are, since a stage uses all of them; else two, or one per two cores."""
    if gpu_count():
        return 1
    return max(2, (os.cpu_count() or 2) // 2)


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log."""
    if not log.exists():
        return "(it left no log: its process did not start)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
