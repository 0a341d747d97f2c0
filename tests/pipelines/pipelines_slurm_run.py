"""Drives and observes a run on a cluster from outside: by commands, files, and the cluster's queue."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipelines_cluster import Slurm, wait_for
from pipelines_smallest import COMMAND, pipeline, write_pretended
from pretend import VERSIONS

from contracts.artifacts import Artifact
from contracts.manifest import MANIFEST

FEW = {"generation": {"tasks": 2}, "scoring": {"tasks": 2}}
"""Two tasks per array, because all of them share this machine."""


class SlurmRun:
    """A run on a cluster."""

    def __init__(self, config: Path, cluster: Slurm) -> None:
        """Observe the run of a config file, which sets the executor."""
        self.cluster = cluster
        self.config = config
        self.path = config.parent / "runs" / config.stem
        self.environment = {**os.environ, **cluster.environment}
        self.detached = False

    @classmethod
    def pretended(
        cls, folder: Path, cluster: Slurm, *, stages: dict[str, Any] | None = None, **acts: list[str]
    ) -> "SlurmRun":
        """A run with fake stages, which misbehave as `acts` specifies (pretend.py)."""
        executor = {"kind": "slurm", "backoff_seconds": 1, "stages": {**FEW, **(stages or {})}}
        return cls(write_pretended(folder, executor=executor, **acts), cluster)

    def release(self, stage: str) -> None:
        """Let a fake stage that waits continue."""
        (self.config.parent / "interpreter" / f"release-{stage.replace('/', '-')}").touch()

    @contextlib.contextmanager
    def unanswered(self) -> Iterator[Callable[[], bool]]:
        """A context in which queries of the environments' versions block. Yields a function that tells whether one is
        waiting."""
        path = self.config.parent / "interpreter" / VERSIONS
        answer = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        writers: list[int] = []

        def is_asked() -> bool:
            with contextlib.suppress(OSError):  # nobody reads
                writers.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return bool(writers)

        try:
            yield is_asked
        finally:
            writers.append(os.open(path, os.O_RDWR))
            path.unlink()
            path.write_bytes(answer)
            os.write(writers[-1], answer)  # for a query that has just begun
            for writer in writers:
                os.close(writer)

    def pipeline(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the command `pipeline` to its end, on the cluster."""
        return pipeline(*arguments, env=self.environment)

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start `pipeline run`, without waiting for its end."""
        log = self.config.with_suffix(".log").open("ab")
        command = [*COMMAND, "run", str(self.config), *arguments]
        return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)

    def detach(self, iterations: int = 2) -> str:
        """Start a detached run, and return the output of the command, which has ended."""
        result = self.pipeline("run", str(self.config), "--iters", str(iterations), "--detach")
        assert result.returncode == 0, result.stderr
        self.detached = True
        return result.stdout

    def digests(self) -> dict[str, str]:
        """The digests of all published artifacts by stage."""
        return digests(self.path)

    def jobs(self, stage: str) -> list[tuple[str, str, str]]:
        """Id, state and node of a stage's jobs and tasks in the queue, without the job that finishes it."""
        lines = self.cluster.run("squeue", "--noheader", "--array", "--format=%i|%T|%N|%j").splitlines()
        rows = [line.split("|", 3) for line in lines]
        return [(id, state, node) for id, state, node, name in rows if name == f"{self.path.name}/{stage}"]

    def finishing_job(self, stage: str) -> str:
        """The id of the job that finishes a stage."""
        lines = self.cluster.run("squeue", "--noheader", "--format=%i|%j").splitlines()
        (found,) = [line.partition("|")[0] for line in lines if line.endswith(f"|{self.path.name}/{stage} (finish)")]
        return found

    def tasks(self, stage: str) -> list[tuple[str, str]]:
        """The ids and nodes of a stage's running jobs."""
        return [(id, node) for id, state, node in self.jobs(stage) if state == "RUNNING"]

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until the condition holds. Raises AssertionError with the run's status after a deadline, or if a
        detached run has no jobs left."""
        try:
            wait_for(lambda: condition() or (self.detached and self.is_over()), seconds, what)
            assert condition(), f"no job is left: {what}"
        except AssertionError as error:
            jobs = self.cluster.run("squeue", "--array", "--format=%i %E %T %r %j %N")
            status = self.pipeline("status", str(self.path))
            raise AssertionError(f"{error}\n{status.stdout}{status.stderr}\n{jobs}") from None

    def wait_for_tasks(self, stage: str, seconds: float = 300) -> list[tuple[str, str]]:
        """Wait until a stage has running jobs, and return their ids and nodes."""
        self.wait_for(lambda: self.tasks(stage), seconds, f"{stage} runs")
        return self.tasks(stage)

    def wait_until_started(self, *stages: str) -> None:
        """Wait until the driver has recorded the start of these stages."""
        self.wait_for(lambda: {*stages} <= {event["stage"] for event in self.events("started")}, 300, f"{stages} start")

    def wait_until_waiting(self, stage: str, times: int = 1) -> None:
        """Wait until the processes of a fake stage have begun to wait `times` times in total."""

        def waits() -> bool:
            logs = (self.path / "logs" / stage).rglob("stage.log")
            return sum(log.read_text().count("pretends to wait") for log in logs) >= times

        self.wait_for(waits, 300, f"{stage} waits")

    def processes(self, stage: str) -> list[int]:
        """The processes of a stage on all nodes."""
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
        """Stop a training's processes in the context, after they have saved another step. Yields their ids."""
        before = self.saved(stage)
        self.wait_for(lambda: self.processes(stage), 400, f"{stage} runs")
        pids = self.processes(stage)
        deadline = time.monotonic() + 200
        while self.saved(stage) == before:  # let it run only for a moment at a time, because it is fast
            assert time.monotonic() < deadline, f"{stage} has saved nothing"
            signal_all(pids, signal.SIGCONT)
            time.sleep(0.03)
            signal_all(pids, signal.SIGSTOP)
        try:
            yield pids
        finally:
            signal_all(pids, signal.SIGCONT)

    def saved(self, stage: str) -> set[tuple[Path, int]]:
        """The states to resume from that an unfinished training has saved, with their times."""
        output = self.path / stage
        states = output.parent.glob(f".{output.name}.partial-*/state/*.safetensors")
        return {(path, path.stat().st_mtime_ns) for path in states}

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The recorded events of a kind."""
        path = self.path / "events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in events if event["event"] == kind]

    def is_over(self) -> bool:
        """Whether the cluster has no jobs left."""
        return not self.cluster.jobs()

    def wait(self, seconds: float = 600) -> str:
        """Wait until no job is left, and return the output of `pipeline status`."""
        self.wait_for(self.is_over, seconds, "all jobs end")
        return self.status()

    def status(self) -> str:
        """The output of `pipeline status`."""
        result = self.pipeline("status", str(self.path))
        assert result.returncode == 0, result.stderr
        return result.stdout


def signal_all(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to processes, some of which may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a stopped process has a pending signal; True if it has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        pending = [int(line.split()[1], 16) for line in lines if line.startswith(("ShdPnd:", "SigPnd:"))]
        return any(mask >> (number - 1) & 1 for mask in pending)
    return True


def digests(run: Path, last: int | None = None) -> dict[str, str]:
    """The digests of a run's published artifacts by stage, up to iteration `last`. The run may still be running."""
    found = {}
    for path, folders, files in os.walk(run):
        folders[:] = [name for name in folders if name not in ("superseded", "logs") and not name.startswith(".")]
        if MANIFEST in files:
            found[Path(path).relative_to(run).as_posix()] = Artifact.open(Path(path)).manifest.digest
    if last is None:
        return found
    known = tuple(f"iteration-{number:03d}/" for number in range(last + 1))
    return {stage: digest for stage, digest in found.items() if stage.startswith(("setup/", "prompts/", *known))}
