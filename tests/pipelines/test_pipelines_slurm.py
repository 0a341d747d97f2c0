"""Runs on a real Slurm cluster of four nodes: attached and detached, whatever happens to their jobs."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from pipelines_cluster import Cluster, wait_for
from pipelines_smallest import COMMAND, FinishedRun, pipeline, write_smallest

from contracts.artifacts import Artifact
from contracts.manifest import MANIFEST
from pipelines.execution.executors.slurm.jobs import last_jobs
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, JobRequeued, StageFailed, StageSubmitted

E = TypeVar("E", bound=Event)

FEW = {"generation": {"tasks": 2}, "scoring": {"tasks": 2}}
"""Two tasks for each array: every task loads a model, and here they share a machine."""


class SlurmRun:
    """A run of the smallest configuration on a cluster."""

    def __init__(self, folder: Path, cluster: Cluster, *, stages: dict[str, Any] | None = None, **changes: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.cluster = cluster
        self.config = write_smallest(folder)
        config = yaml.safe_load(self.config.read_text())
        executor = {"kind": "slurm", "backoff_seconds": 1, "stages": {**FEW, **(stages or {})}}
        self.config.write_text(yaml.safe_dump({**config, "executor": executor, **changes}))
        self.path = folder / "runs" / "smallest"
        self.run = RunDirectory(self.path)
        self.environment = {**os.environ, **cluster.environment}
        self.detached = False

    def pipeline(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the command to its end, on the cluster."""
        return pipeline(*arguments, env=self.environment)

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start `pipeline run`, without waiting for its end."""
        log = self.config.with_suffix(".log").open("ab")
        command = [*COMMAND, "run", str(self.config), *arguments]
        return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)

    def detach(self, iterations: int = 2) -> None:
        """Submit everything; the shell that did is gone afterwards."""
        result = self.pipeline("run", str(self.config), "--iters", str(iterations), "--detach")
        assert result.returncode == 0, result.stderr
        self.detached = True

    def digests(self) -> dict[str, str]:
        """The digest of everything that is published, by stage."""
        return digests(self.path)

    def tasks(self, stage: str, state: str = "RUNNING") -> list[tuple[str, str]]:
        """Ids and nodes of a stage's tasks that are in this state."""
        jobs = last_jobs(self.run, stage)
        if jobs is None:
            return []
        lines = self.cluster.run("squeue", "--noheader", "--format=%F|%i|%T|%N").splitlines()
        rows = [line.split("|") for line in lines]
        return [(id, node) for base, id, found, node in rows if base == jobs.work and found == state]

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until the condition holds; AssertionError with the run's status if not, or if a chain has ended."""
        try:
            wait_for(lambda: condition() or (self.detached and self.is_over()), seconds, what)
            assert condition(), f"no job is left: {what}"
        except AssertionError as error:
            jobs = self.cluster.run("squeue", "--array", "--format=%i %E %T %r %j %N")
            nodes = self.cluster.run("scontrol", "--oneliner", "show", "nodes")
            raise AssertionError(f"{error}\n{self.status()}\n{jobs}\n{nodes}") from None

    def wait_for_tasks(self, stage: str, seconds: float = 300) -> list[tuple[str, str]]:
        """The same, as soon as there are any."""
        self.wait_for(lambda: self.tasks(stage), seconds, f"{stage} runs")
        return self.tasks(stage)

    def processes(self, stage: str) -> list[int]:
        """The processes of a stage itself, on whatever node."""
        found = []
        mark = f"RATCHET_ATTEMPT={self.path}/logs/{stage}/".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (
                    mark in (folder / "environ").read_bytes()
                    and b"multiprocessing" not in (folder / "cmdline").read_bytes()
                ):
                    found.append(int(folder.name))
        return found

    @contextlib.contextmanager
    def frozen(self, stage: str) -> Iterator[list[int]]:
        """Stop a training's processes after they have saved a step, so that what is done to it is in time."""
        self.wait_for(lambda: self.processes(stage), 400, f"{stage} runs")
        pids = self.processes(stage)
        deadline = time.monotonic() + 200
        while not self.saved(stage):  # let it go on for a moment at a time: it is quick
            assert time.monotonic() < deadline, f"{stage} has saved nothing"
            signal_all(pids, signal.SIGCONT)
            time.sleep(0.03)
            signal_all(pids, signal.SIGSTOP)
        try:
            yield pids
        finally:
            signal_all(pids, signal.SIGCONT)

    def saved(self, stage: str) -> bool:
        """Whether a training that is under way has saved what it could go on from."""
        output = self.path / stage
        return any(output.parent.glob(f".{output.name}.partial-*/state/*.safetensors"))

    def events(self, kind: type[E]) -> list[E]:
        """What was recorded of a kind."""
        return [event for event in self.run.events() if isinstance(event, kind)]

    def is_over(self) -> bool:
        """Whether no job of the cluster is left."""
        return not self.cluster.jobs()

    def wait(self, seconds: float = 600) -> str:
        """Wait until no job is left, and return what the run's status says then."""
        self.wait_for(self.is_over, seconds, "all jobs end")
        return self.status()

    def status(self) -> str:
        """What `pipeline status` says of the run."""
        result = self.pipeline("status", str(self.path))
        assert result.returncode == 0, result.stderr
        return result.stdout


def signal_all(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to processes, some of which may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


pytestmark = pytest.mark.timeout(1800)


def digests(run: Path) -> dict[str, str]:
    """The digest of everything that a run has published, by stage."""
    found = {}
    for path in run.rglob(MANIFEST):
        name = path.parent.relative_to(run)
        if name.parts[0] not in ("superseded", "logs") and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = Artifact.open(path.parent).manifest.digest
    return found


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a stopped process has a signal to answer as soon as it goes on."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        pending = [int(line.split()[1], 16) for line in lines if line.startswith(("ShdPnd:", "SigPnd:"))]
        return any(mask >> (number - 1) & 1 for mask in pending)
    return True


def test_a_driver_on_a_cluster_makes_what_one_on_a_laptop_makes(
    tmp_path: Path, cluster: Cluster, finished_run: FinishedRun
) -> None:
    """Its driver is killed twice meanwhile; the next one takes up the jobs that go on."""
    run = SlurmRun(tmp_path, cluster)
    for stage in ("setup/reward-model/generation", "iteration-001/reward"):
        driver = run.start("--iters", "1")
        tasks = {id for id, _ in run.wait_for_tasks(stage)}
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert tasks & cluster.jobs()
    result = run.pipeline("run", str(run.config), "--iters", "1")
    assert result.returncode == 0, result.stderr
    assert "goes on since an earlier command" in run.config.with_suffix(".log").read_text() + result.stdout
    assert run.digests() == {
        stage: digest for stage, digest in digests(finished_run.path).items() if "iteration-002" not in stage
    }
    assert all(attempt.name == "attempt-1" for attempt in (run.path / "logs").rglob("attempt-*")), "nothing twice"
    assert run.is_over()


def test_a_chain_without_a_driver_survives_what_a_cluster_does_to_it(
    tmp_path: Path, cluster: Cluster, finished_run: FinishedRun
) -> None:
    """A node fails, a task of an array is cancelled, the controller is killed, a training is preempted and another one
    reaches its time limit: it ends by itself with the digests of the local run, and its report names all of that."""
    run = SlurmRun(tmp_path, cluster, stages={"training": {"partition": "low"}})
    run.detach()

    task, _ = run.wait_for_tasks("setup/reward-model/generation")[0]
    cluster.run("scancel", task)

    with run.frozen("iteration-001/training") as pids:
        ((preempted, node),) = run.tasks("iteration-001/training")
        blocker = cluster.submit("sleep 600", "--partition=gpu", f"--nodelist={node}", "--exclusive")
        wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), 60, "the training is told")
    wait_for(lambda: any(event.reason == "preempted" for event in run.events(JobRequeued)), 60, "it asks for a requeue")
    cluster.run("scancel", blocker)

    cluster.restart_controller()

    node = run.wait_for_tasks("iteration-002/generation")[0][1]
    cluster.set_down(node)
    try:
        with run.frozen("iteration-002/training") as pids:
            ((limited, _),) = run.tasks("iteration-002/training")
            cluster.run("scontrol", "update", f"jobid={limited}", "timelimit=1")
            wait_for(lambda: all(is_pending(pid, signal.SIGUSR2) for pid in pids), 90, "the training is told")
        status = run.wait()
    finally:
        cluster.set_up(node)

    assert run.digests() == digests(finished_run.path)
    report = (run.path / "report.txt").read_text()
    for text in (report, status):
        assert re.search(rf"setup/reward-model/generation: job {task} on node\d: cancelled by", text)
        assert re.search(rf"iteration-001/training: job {preempted} .* requeued \(preempted\)", text)
        assert re.search(rf"iteration-002/generation: job \d+_\d on {node}: its node failed", text)
        assert re.search(rf"iteration-002/training: job {limited} .* requeued \(time limit\)", text)


BROKEN = """
def variety(*, messages, response, finish_reason, answer):
    raise RuntimeError("no such dictionary")
"""


def test_after_a_failure_nothing_waits_for_ever_and_the_same_command_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    run = SlurmRun(tmp_path, cluster)
    rules = (tmp_path / "rules.py").read_text()
    (tmp_path / "rules.py").write_text(BROKEN)
    run.detach(iterations=1)

    status = run.wait()
    assert re.search(r"FAILED setup/reward-model/labels: .*no such dictionary.* \(log: .*stage.log\)", status), status
    assert re.search(r"setup/reward-model/pairs +│ blocked .*by setup/reward-model/labels", status), status
    assert re.search(r"iteration-001/training +│ blocked .*by iteration-001/pairs", status), status
    assert "setup/reward-model/labels: attempt-1 failed with exit code 2. Not tried again." in status
    attached = run.pipeline("attach", str(run.path))
    assert attached.returncode == 1
    assert "setup/reward-model/labels" in attached.stderr
    assert "no such dictionary" in attached.stderr
    assert "Traceback" not in attached.stderr
    logs = run.pipeline("logs", str(run.path))
    assert "no such dictionary" in logs.stdout, logs.stderr

    before = run.digests()
    (tmp_path / "rules.py").write_text(rules)
    run.detach(iterations=1)
    submitted = {event.stage for event in run.events(StageSubmitted) if event.attempt == "attempt-2"}
    assert "setup/reward-model/labels" in submitted
    assert "iteration-001/training" in submitted
    assert not submitted & before.keys()
    result = run.pipeline("run", str(run.config), "--iters", "1", "--detach")
    assert "0 of 25 stages submitted as 0 jobs" in result.stdout
    assert "under way already" in result.stdout
    result = run.pipeline("run", str(run.config), "--iters", "1")
    assert result.returncode == 2
    assert "pipeline attach" in result.stderr
    result = run.pipeline("run", str(run.config), "--iters", "1", "--detach", "training.learning_rate=2e-4")
    assert result.returncode == 2
    assert "with other settings" in result.stderr

    before = len(run.events(StageSubmitted))
    result = run.pipeline("cancel", str(run.path))
    assert result.returncode == 0, result.stderr
    wait_for(run.is_over, 60, "all jobs end")
    assert len(run.events(StageSubmitted)) == before, "what was cancelled is not tried again"
    assert run.pipeline("cancel", str(run.path)).stdout.startswith("nobody works on")


def test_two_nodes_with_two_processes_each_give_the_losses_of_one(
    tmp_path: Path, cluster: Cluster, finished_run: FinishedRun
) -> None:
    """Only the training runs on the cluster, the other stages on this machine."""
    result = pipeline("fork", str(finished_run.path), "--from-iteration", "1", "--name", "nodes")
    assert result.returncode == 0, result.stderr
    forked = finished_run.path.with_name("nodes")
    config = yaml.safe_load((forked / "config.yaml").read_text())
    config["executor"] = {"stages": {"iteration-001/training": {"kind": "slurm", "nodes": 2}}}
    config["training"]["parallel"] = {"dp": 4}
    (forked / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {**os.environ, **cluster.environment}
    result = pipeline(
        "run", str(forked / "config.yaml"), "--iters", "1", "--force", "iteration-001/training", env=environment
    )
    assert result.returncode == 0, result.stderr
    jobs = last_jobs(RunDirectory(forked), "iteration-001/training")
    assert jobs is not None
    assert {row["NodeList"] for row in cluster.accounting([jobs.work]).values()} == {"node[1-2]"}
    here, there = (read_losses(path / "iteration-001/training") for path in (finished_run.path, forked))
    assert len(here) == len(there) > 3
    for one, four in zip(here, there, strict=True):
        assert one == pytest.approx(four, abs=1e-4)


def read_losses(training: Path) -> list[float]:
    """The loss of every step."""
    lines = [json.loads(line) for line in (training / "training-log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


SLOW = """
import os, pathlib, time
pathlib.Path({folder!r}, f"start-{{os.getpid()}}").touch()
time.sleep(3)
raise ImportError("none here")
"""
"""In the place of numpy, which submitit loads first if it can."""


def test_a_chain_outlives_a_killed_job_an_early_notice_and_accounting(tmp_path: Path, cluster: Cluster) -> None:
    """The job of a light stage, which nobody looks after, is killed while its Python still starts; what it starts in
    its place is told to stop then, and once more while it asks for the versions of the environment. While accounting
    is away, the stages go on; when it is back, it tells what happened."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "numpy.py").write_text(SLOW.format(folder=str(slow)))
    run = SlurmRun(tmp_path, cluster, stages={"setup/world": {"setup": [f"export PYTHONPATH={slow}"]}})
    run.detach(iterations=0)
    run.wait_for(lambda: any(slow.glob("start-*")), 60, "Python starts")
    (start,) = slow.glob("start-*")
    os.kill(int(start.name.partition("-")[2]), signal.SIGKILL)
    run.wait_for(lambda: any(path != start for path in slow.glob("start-*")), 60, "it starts again")
    ((world, _),) = run.tasks("setup/world")
    cluster.run("scancel", "--signal=USR2", world)
    run.wait_for(lambda: run.events(JobRequeued), 60, "the job asks for a requeue")
    run.wait_for((run.run.attempts("setup/world")[0] / "prepare.lock").exists, 60, "it looks at the environment")
    cluster.run("scancel", "--signal=USR2", world)
    run.wait_for(lambda: len(run.events(JobRequeued)) == 2, 60, "the job asks for another requeue")

    task, _ = run.wait_for_tasks("iteration-000/heldout/generation")[0]
    cluster.kill("slurmdbd")
    try:
        cluster.run("scancel", task)
        run.wait_for(lambda: "iteration-000/heldout/gold" in run.digests(), 200, "what reads that stage is published")
        assert "What happened to some of the jobs on the way is not known: `sacct" in run.status()
    finally:
        cluster.up()
    line = rf"iteration-000/heldout/generation: job {task} on node\d: cancelled by"
    wait_for(lambda: re.search(line, run.status()), 60, "the controller has told accounting of the cancelled task")
    status = run.status()
    assert re.search(rf"setup/world: job {world} .* exit code 137, and was started again", status), status
    assert re.search(rf"setup/world: job {world} .* requeued \(signal, \d+ s before the time limit\)", status), status
    assert not run.events(StageFailed)
    assert run.pipeline("cancel", str(run.path)).returncode == 0
    wait_for(run.is_over, 60, "all jobs end")


def test_a_cancelled_finishing_job_is_named(tmp_path: Path, cluster: Cluster) -> None:
    """Nobody is left to conclude then: status asks accounting, and the next command takes note of it."""
    run = SlurmRun(tmp_path, cluster)
    run.detach(iterations=0)
    jobs = last_jobs(run.run, "iteration-000/heldout/generation")
    assert jobs is not None
    cluster.run("scancel", jobs.last)
    status = run.wait()
    line = rf"iteration-000/heldout/generation: job {jobs.last} before it started: cancelled by"
    assert re.search(line, status), status
    assert re.search(r"iteration-000/evaluation +│ blocked", status), status
    assert len(re.findall(": cancelled", status)) == 1, "what Slurm cancelled because of that is not told one by one"
    run.detach(iterations=0)
    assert re.search(line, run.wait())
    assert "iteration-000/evaluation" in run.digests()
