"""Executes injected faults within the processes of a run; tests/pipelines/chaos.py puts this next to the copied code.

Each fault is a file in the directory RATCHET_CHAOS. It names the process and the point of its work at which the fault
happens, and the action. The first process that reaches the point claims the file by a rename, so that each fault
happens once.

Points of a stage:
  begin      its hidden directory is claimed               compute    at a random time after that
  write      half of a file's rows are written             commit     a file is complete, but not renamed
  receipt    the file is renamed, but has no receipt       committed  the file has its receipt
  receipted  the same, for a receipt that is torn
  progress   it reports its progress
  state      the training state is written, not renamed    saved      the training state is in place
  step       a random time after an optimizer step
  manifest   the manifest is written, but not renamed
  finish     the manifest is in place                      rename     only the rename of the directory is missing
  published  the directory is renamed, and the stage is about to end
Points of the driver:
  claim      run.json or config.resolved.yaml              request    a stage's config or command line
  metrics    metrics.jsonl                                 record     a line of events.jsonl
  submitted  a stage was started                           between    a stage was published, the next not started
Points of a supervisor:
  spawned    a random time after it has started the stage  exit       how the stage ended, exit.json
"""

import errno
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

CHAOS = "RATCHET_CHAOS"
SUPERVISOR = "RATCHET_CHAOS_SUPERVISOR"
Fault = dict[str, Any]


def identity() -> tuple[str, str | None]:
    """The kind of this process (stage, driver, supervisor, or nobody, which has no faults), and the stage's name."""
    if attempt := os.environ.get("RATCHET_ATTEMPT"):
        return "stage", str(Path(attempt).parent.relative_to(Path(os.environ["RATCHET_RUN"], "logs")))
    if sys.orig_argv[1:4] == ["-m", "pipelines", "run"]:
        return "driver", None
    return ("supervisor" if "pipelines.execution.supervisor" in sys.orig_argv else "nobody"), None


def forks() -> bool:
    """Whether this process forks others, which can have faults."""
    return "contracts.warm" in sys.orig_argv


class Faults:
    """The faults that may hit this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: tuple[int, str | None] | None = None
        self.reached: Counter[str] = Counter()
        self.waiting: list[Fault] = []
        self.look()

    def look(self) -> None:
        """Update the identity of this process and its faults; it changes by a fork and with another stage."""
        now = (os.getpid(), os.environ.get("RATCHET_ATTEMPT"))
        if now == self.known:
            return
        self.known = now
        self.who, self.stage = identity()
        self.reached.clear()
        found = [json.loads(path.read_bytes()) for path in sorted(self.folder.glob("*.json"))]
        self.waiting = [fault for fault in found if fault["who"] == self.who]

    def due(self, point: str, stage: str | None) -> Fault | None:
        """The fault that is due at a point, if any; it still has to be claimed by `take`."""
        self.reached[point] += 1
        for fault in self.waiting:
            if fault["point"] == point and fault["stage"] == stage and self.reached[point] >= fault["occurrence"]:
                return fault
        return None

    def take(self, fault: Fault, path: Path | None) -> bool:
        """Claim a fault. Returns False if another process was faster."""
        self.waiting.remove(fault)
        try:
            os.rename(self.folder / f"{fault['id']:04d}.json", self.folder / f"{fault['id']:04d}.taken")
        except FileNotFoundError:
            return False
        self.note(fault=fault["id"], stage=fault["stage"], file=path.name if path else None)
        return True

    def note(self, **facts: Any) -> None:
        """Append to the harness's log."""
        attempt = os.environ.get("RATCHET_ATTEMPT")
        line = {"stage": self.stage, "attempt": Path(attempt).name if attempt else None, **facts}
        with (self.folder / "log.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    def point(self, point: str, path: Path | None = None, stage: str | None = None) -> None:
        """Execute the fault that is due at a point, if any; `path` is the file that is being written."""
        self.look()
        fault = self.due(point, stage or self.stage)
        if fault is not None and self.take(fault, path):
            self.strike(fault, path)

    def later(self, point: str, stage: str | None = None) -> None:
        """Execute the fault that is due at a point after its delay, regardless of what the process does then."""
        self.look()
        fault = self.due(point, stage or self.stage)
        if fault is None:
            return

        begun = self.known

        def wait() -> None:
            time.sleep(fault["seconds"])
            if self.known == begun and fault in self.waiting and self.take(fault, None):
                self.strike(fault, None)

        threading.Thread(target=wait, daemon=True).start()

    def strike(self, fault: Fault, path: Path | None) -> None:
        """Execute a fault."""
        action = fault["action"]
        if action == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif action == "SIGKILL":
            kill(fault["victim"])
        else:
            assert path is not None
            if action == "torn" or path.suffix == ".tmp":  # a full disk cuts only files that are being written
                damage(path, fault)
            if action == "torn":
                kill("self")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def kill(victim: str) -> None:
    """Send SIGKILL to this process, its whole group, or its supervisor, whose end also ends this process."""
    if victim == "group":
        os.killpg(0, signal.SIGKILL)
    supervisor = int(os.environ.get(SUPERVISOR, "0"))
    there = supervisor and Path(f"/proc/{supervisor}").exists()
    os.kill(supervisor if victim == "supervisor" and there else os.getpid(), signal.SIGKILL)


def damage(path: Path, fault: Fault) -> None:
    """Cut a file at a random position, or zero everything after it, like a write that was not flushed."""
    if not path.is_file():
        return
    size = path.stat().st_size
    os.truncate(path, int(size * fault["share"]))
    if fault["zeros"]:
        os.truncate(path, size)


# The points.


def on_rename(faults: Faults, source: Path, target: Path) -> None:
    """Derive the point from the file that is about to be renamed."""
    faults.look()
    if source.name.startswith(".") and ".partial-" in source.name:
        faults.point("rename", source / "manifest.json")
    elif not source.name.endswith(".tmp"):
        return
    elif any(".partial-" in part for part in target.parts):
        names = {"manifest.json": "manifest", "receipt": "receipt", "state": "state"}
        kind = "receipt" if target.name.startswith(".receipt-") else target.name
        faults.point(names.get("state" if target.parent.name == "state" else kind, "commit"), source)
    elif faults.who == "stage" and target.name == "progress.json":
        faults.point("progress", source)
    elif faults.who == "supervisor" and target.name == "exit.json":
        faults.point("exit", source, str(target.parent.parent).rpartition("/logs/")[2])
    elif faults.who == "driver":
        names = {"run.json": "claim", "config.resolved.yaml": "claim"}
        names |= {"request.json": "request", "stage.yaml": "request"}
        if target.name in names:
            faults.point(names[target.name], source)


def audit(faults: Faults, event: str, arguments: tuple[Any, ...]) -> None:
    """Handle an audit event of the interpreter."""
    if event == "os.rename":
        on_rename(faults, Path(os.fsdecode(arguments[0])), Path(os.fsdecode(arguments[1])))


def publication(faults: Faults, module: ModuleType) -> None:
    """Patch contracts.publication."""
    cls = module.Publication
    begin, commit, finish = cls.begin, cls.commit, cls.finish

    @functools.wraps(begin)
    def new_begin(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        faults.point("begin", self.directory / ".scratch")
        faults.later("compute")

    @functools.wraps(commit)
    def new_commit(self: Any, name: str, *arguments: Any, **options: Any) -> None:
        commit(self, name, *arguments, **options)
        faults.note(made=name)
        faults.point("committed", self.directory / name)
        faults.point("receipted", self.directory / f".receipt-{name.replace('/', '--')}.json")

    @functools.wraps(finish)
    def new_finish(self: Any) -> Any:
        faults.point("finish", self.directory / "manifest.json")
        artifact = finish(self)
        faults.point("published")
        return artifact

    cls.begin, cls.commit, cls.finish = new_begin, new_commit, new_finish


def jsonl(faults: Faults, module: ModuleType) -> None:
    """Patch contracts.jsonl."""
    write_jsonl = module.write_jsonl

    @functools.wraps(write_jsonl)
    def new_write_jsonl(path: Path, records: Any) -> int:
        rows = list(records)
        faults.look()
        fault = faults.due("write", faults.stage)
        if fault is not None and faults.take(fault, path):
            write_jsonl(path, rows[: len(rows) // 2 + 1])
            faults.strike(fault, path)
        return int(write_jsonl(path, rows))

    module.write_jsonl = new_write_jsonl  # type: ignore[attr-defined]


def stage(faults: Faults, module: ModuleType) -> None:
    """Patch contracts.stage."""
    progress = module.Context.progress

    @functools.wraps(progress)
    def new_progress(self: Any, done: int, total: int, unit: str) -> None:
        if unit == "steps":
            faults.note(step=done)
            faults.later("step")
        progress(self, done, total, unit)

    module.Context.progress = new_progress


def state(faults: Faults, module: ModuleType) -> None:
    """Patch training.state."""
    save = module.TrainingState.save

    @functools.wraps(save)
    def new_save(self: Any, log: list[Any]) -> None:
        save(self, log)
        faults.note(saved=len(log))
        faults.point("saved", self.path)

    module.TrainingState.save = new_save


def supervisor(faults: Faults, module: ModuleType) -> None:
    """Patch pipelines.execution.supervisor."""
    start = module._start

    @functools.wraps(start)
    def new_start(request: Any, environment: dict[str, str], log: Any) -> Any:
        attempt = environment["RATCHET_ATTEMPT"]
        process = start(request, {**environment, SUPERVISOR: str(os.getpid())}, log)
        faults.later("spawned", attempt.rpartition("/logs/")[2].rpartition("/attempt-")[0])
        return process

    module._start = new_start  # type: ignore[attr-defined]


def rundir(faults: Faults, module: ModuleType) -> None:
    """Patch pipelines.run.directory."""
    record = module.RunDirectory.record

    @functools.wraps(record)
    def new_record(self: Any, event: Any) -> None:
        path = self.path / "events.jsonl"
        fault = faults.due("record", None)
        if fault is not None and faults.take(fault, path):
            if fault["action"] in ("torn", "ENOSPC"):
                with path.open("ab") as file:
                    file.write(b"\0" * 40 if fault["zeros"] else b'{"time":1234567890.123,"event":"sta'[: fault["id"]])
                fault = {**fault, "share": 1.0}
            faults.strike(fault, path)
        record(self, event)
        if type(event).__name__ == "StagePublished":
            faults.point("between")

    module.RunDirectory.record = new_record


def points(faults: Faults, module: ModuleType) -> None:
    """Patch pipelines.run.points."""
    record = module.PointStream.record

    @functools.wraps(record)
    def new_record(self: Any, points: Any) -> None:
        points = list(points)
        fault = faults.due("metrics", None) if points else None
        if fault is not None and faults.take(fault, self.path):
            if fault["action"] == "torn":
                with self.path.open("ab") as file:
                    file.write(
                        b"\0" * 40 if fault["zeros"] else b'{"point":0,"time":1234567890.123,"sta'[: fault["id"]]
                    )
                fault = {**fault, "share": 1.0}
            faults.strike(fault, self.path)
        record(self, points)

    module.PointStream.record = new_record


def executors(faults: Faults, module: ModuleType) -> None:
    """Patch pipelines.execution.executors.local."""
    submit = module.LocalExecutor.submit

    @functools.wraps(submit)
    def new_submit(self: Any, *arguments: Any) -> Any:
        job = submit(self, *arguments)
        faults.point("submitted")
        return job

    module.LocalExecutor.submit = new_submit


PATCHES = {
    "contracts.publication": publication,
    "contracts.jsonl": jsonl,
    "contracts.stage": stage,
    "training.state": state,
    "pipelines.execution.supervisor": supervisor,
    "pipelines.run.directory": rundir,
    "pipelines.run.points": points,
    "pipelines.execution.executors.local": executors,
}


class Patcher(importlib.abc.MetaPathFinder):
    """Patches modules right after their import, before other modules can import functions from them."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        patch = PATCHES.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(self.faults, module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(folder: Path) -> None:
    """Enable the faults of this process."""
    faults = Faults(folder)
    if faults.who == "nobody" and not forks():
        return
    sys.meta_path.insert(0, Patcher(faults))
    sys.addaudithook(lambda event, arguments: audit(faults, event, arguments))


if CHAOS in os.environ:
    install(Path(os.environ[CHAOS]))
