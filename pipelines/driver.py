"""The driver: runs a graph's stages as soon as their inputs are published, each at most once."""

import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec
import yaml

from contracts import stopping
from contracts.artifacts import MANIFEST, RELEASED, Artifact, write_atomically
from contracts.attempt import FailureKind
from contracts.errors import UserError
from contracts.stage import require_space
from pipelines.config import RunConfig
from pipelines.decisions import Decision, decide, drop_partials, make_room
from pipelines.display import Display
from pipelines.environments import launch_command, probe_versions
from pipelines.estimates import disk_bytes
from pipelines.executors import Running, clear_job_folders, make_executor
from pipelines.graph import Graph, Node
from pipelines.placement import gpu_count
from pipelines.report import write_metrics
from pipelines.retention import CHECKPOINT, Retention, drop_aside, released_inputs, restore, set_aside, why_again
from pipelines.rundir import RunDirectory
from pipelines.supervisor import Ending, Request, end_orphans, ending_of, process_identity

POLL_SECONDS = 0.1
END_SECONDS = 20.0
LONGEST_PAUSE = 600.0


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
        # Weights can go once their policy is judged: then one iteration is finished after another.
        self.order = graph.by_urgency() if config.retention.keep == "all" else list(graph.nodes.values())
        self.config = config
        self.display = display
        self.executor = make_executor(config.executor.kind)
        self.parallel = config.executor.parallel or default_parallel()
        self.published: set[str] = set()
        self.running: dict[str, Running] = {}
        self.retries = Retries(config.executor.retries, config.executor.backoff_seconds)
        self.retention = Retention(run, graph, config.retention, display.note)
        self.again: dict[str, str] = {}  # released stages that are to be made again, and why
        self.ran = 0

    def drive(self) -> int:
        """Publish every stage of the graph; returns how many had to be run.

        Raises:
            UserError: a stage found a mistake of the user's.
            StageFailedError: a stage failed otherwise.
        """
        for pid in end_orphans(self.run.path):
            self.run.record("orphan ended", pid=pid)
        clear_job_folders(self.run.path)
        self.run.clear_scratch()
        restore(self.run.path)
        for number in (*stopping.SIGNALS, signal.SIGHUP):
            signal.signal(number, _interrupt)
        with self.retention:
            try:
                while len(self.published) < len(self.graph.nodes):
                    self.start_ready()
                    self.collect_ended()
                    self.retention.poll()
                    self.display.refresh(self.running)
                    time.sleep(POLL_SECONDS)
            finally:
                self.end_running()
                self.run.clear_scratch()
            self.retention.apply(self.published)
            while self.retention.poll():
                time.sleep(POLL_SECONDS)
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
            if not self.retries.waits(node.name):
                self.reuse_or_start(node)

    def reuse_or_start(self, node: Node) -> None:
        """Decide about one stage and act on it."""
        environment = getattr(self.config.environments, node.environment)
        decision = decide(node, probe_versions(environment, node.environment), self.run.path)
        if decision.reuse and node.name in self.again and (node.output / RELEASED).is_file():
            decision = Decision(False, self.again[node.name], decision.key)
        if not decision.reuse and self.make_inputs_again(node):
            return
        make_room(node, decision, self.run.path)
        if decision.reuse:
            self.published.add(node.name)
            self.display.reused(node, decision.reason)
            self.publish_metrics(node)
            return
        if (node.output / RELEASED).is_file():
            set_aside(node.output)
        self.require_room(node)
        attempt = self.run.new_attempt(node.name)
        self.write_request(node, attempt)
        job = self.executor.submit(node.name, attempt, self.run.path)
        self.running[node.name] = Running(node, attempt, job, decision.key)
        self.run.record("started", stage=node.name, reason=decision.reason, key=decision.key, attempt=attempt.name)
        self.display.started(node, decision.reason)

    def make_inputs_again(self, node: Node) -> bool:
        """Have the stages run again whose deleted weights `node` needs; whether there are any to wait for."""
        released = released_inputs(node, self.graph)
        for name in released:
            self.again[name] = why_again(node.name)
            self.undo(name)
        return bool(released)

    def undo(self, name: str) -> None:
        """Have a stage decided about once more that was published already."""
        if name in self.published:
            self.published.remove(name)
            self.display.done -= 1

    def require_room(self, node: Node) -> None:
        """Raise UserError when the disk has no room for what a stage is estimated to write."""
        require_space(self.run.path, "directory")
        needed, free = disk_bytes(node, self.graph), shutil.disk_usage(self.run.path).free
        if self.config.executor.check_space and free < needed:
            raise UserError(
                f"stage {node.name} may need {needed >> 20} MiB on the disk of {self.run.path}, which has {free >> 20} "
                "MiB free. Free some space (`pipeline gc` says what can go), set directory=PATH on another disk, or "
                "executor.check_space=false to start all the same."
            )

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
            grace_seconds=self.config.executor.grace_seconds,
            stall_seconds=self.config.executor.stall_seconds,
        )
        write_atomically(attempt / "request.json", msgspec.json.encode(request))

    def collect_ended(self) -> None:
        """Take note of stages that have ended: published, to be tried again, or failed, which stops the run."""
        for running in list(self.running.values()):
            if not running.job.ended():
                continue
            del self.running[running.node.name]
            running.job.clear(running.attempt)
            if not (running.node.output / MANIFEST).is_file():
                self.retry_or_fail(running)
                continue
            artifact = Artifact.open(running.node.output)
            self.require_key(running, artifact)
            self.ran += 1
            if self.published.issuperset(running.node.needs):  # no input is about to change after all
                self.published.add(running.node.name)
            drop_partials(running.node)
            self.run.record("published", stage=running.node.name, key=artifact.manifest.key)
            self.display.published(running.node, artifact)
            self.publish_metrics(running.node)
            self.finish_again(running.node)
            if CHECKPOINT.fullmatch(running.node.name) or running.node.config.stage == "evaluation":
                self.retention.apply(self.published)

    def finish_again(self, node: Node) -> None:
        """After a released stage has been made again: where it came out differently, so may what was made from it."""
        if self.again.pop(node.name, None) is None or drop_aside(node.output, self.run.path):
            return
        self.display.note(f"differs {node.name}  (from what it was before its weights were deleted)")
        outdated = {node.name}
        for later in self.graph.nodes.values():
            if outdated.intersection(later.needs):
                outdated.add(later.name)
                self.undo(later.name)

    def publish_metrics(self, node: Node) -> None:
        """After an evaluation: write metrics.jsonl anew from the evaluations published so far."""
        if node.config.stage == "evaluation":
            write_metrics(self.run.path, self.graph)

    def require_key(self, running: Running, artifact: Artifact) -> None:
        """Raise StageFailedError when a stage published something else than it was asked for."""
        if artifact.manifest.key != running.key:
            raise StageFailedError(
                f"stage {running.node.name} published under the key {artifact.manifest.key[:12]}, but the driver asked "
                f"for {running.key[:12]}: its code, its environment or an input changed while it ran. The same command "
                "decides anew.",
                1,
            )

    def retry_or_fail(self, running: Running) -> None:
        """After an attempt that published nothing: plan the next one, or stop the run."""
        require_space(self.run.path, "directory")
        ending = ending_of(running.attempt)
        name = running.node.name
        pause = self.retries.pause_after(name, ending.kind)
        self.run.record("failed", stage=name, attempt=running.attempt.name, kind=ending.kind, retry_in=pause)
        if pause is None:
            self.fail(running, ending)
        else:
            self.display.retried(running.node, ending.how, pause)

    def fail(self, running: Running, ending: Ending) -> NoReturn:
        """Stop the run with what the stage left as its reason."""
        name, log = running.node.name, running.attempt / "stage.log"
        self.display.failed(running.node)
        program = ["python", "-m", "pipelines"] if sys.argv[0].endswith("__main__.py") else [sys.argv[0]]
        resume = f"Then continue with: {shlex.join([*program, *sys.argv[1:]])}"
        if ending.kind == "user":
            raise UserError(f"stage {name}: {ending.reason}\n  log: {log}\n  {resume}")
        reason = ending.reason or tail(log)
        raise StageFailedError(f"stage {name} {ending.how}\n{reason.rstrip()}\n  log: {log}\n  {resume}", 1)

    def end_running(self) -> None:
        """End the stages that still run: after a failure or an interrupt. What they published in part is kept."""
        if not self.running:
            return
        grace = self.config.executor.grace_seconds
        self.display.ending(self.running, grace)
        try:
            for running in self.running.values():
                (running.attempt / "cancel").touch()
            deadline = time.monotonic() + grace + END_SECONDS
            while any(not running.job.ended() for running in self.running.values()) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        finally:  # also when interrupted once more
            end_orphans(self.run.path)
            clear_job_folders(self.run.path)


class Retries:
    """Which stages may be tried again, and when."""

    def __init__(self, limit: int, backoff: float) -> None:
        self.limit = limit
        self.backoff = backoff
        self._accidents: Counter[str] = Counter()
        self._preemptions: Counter[str] = Counter()
        self._until: dict[str, float] = {}

    def waits(self, stage: str) -> bool:
        """Whether it is too early for the next try."""
        return time.monotonic() < self._until.get(stage, 0.0)

    def pause_after(self, stage: str, kind: FailureKind) -> float | None:
        """Seconds until the next try, or None where there is to be none.

        The pause doubles with every try and is drawn from 50 % to 150 % of that, so that what failed together does not
        come back together.
        """
        if kind == "stopped":
            counted = self._preemptions
        elif kind == "transient" and self._accidents[stage] < self.limit:
            counted = self._accidents
        else:
            return None
        counted[stage] += 1
        pause: float = min(self.backoff * 2 ** min(counted[stage] - 1, 10), LONGEST_PAUSE) * random.uniform(0.5, 1.5)
        self._until[stage] = time.monotonic() + pause
        return round(pause, 1)


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
