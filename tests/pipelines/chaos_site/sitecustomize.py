"""Faults on purpose: tests/pipelines/chaos.py puts this beside the frozen code that a run is started from.

Each fault is a file in the directory that RATCHET_CHAOS names: who is to meet it, at which point of the work, and what
happens there. The first process that gets there takes the file by a rename, so that each fault happens once.

Points of a stage:
  begin      it has taken over its hidden directory        compute    some time later, whatever it does then
  write      half of a file's rows are written             commit     a file is whole, but has not its name yet
  receipt    it has its name, but no receipt yet           committed  it has its receipt, too
  receipted  the same, for a receipt that is torn
  progress   it tells how far it is
  state      the training's state is written, not renamed  saved      the training's state is in place
  step       some time after an optimizer step
  manifest   the manifest is written, but has not its name yet
  finish     the manifest is there                         rename     only the rename of the directory is missing
  published  the directory has its name, and the stage goes on to its end
Points of the driver:
  claim      run.json or config.resolved.yaml              request    a stage's config or command line
  metrics    metrics.jsonl                                 record     a line of events.jsonl
  submitted  a stage was started                           between    a stage was published, the next not started
Points of a supervisor:
  spawned    some time after it has started the stage      exit       how the stage ended, exit.json
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
    """Who this process is: a stage and its name, the driver, a supervisor, or nobody who meets faults."""
    if attempt := os.environ.get("RATCHET_ATTEMPT"):
        return "stage", str(Path(attempt).parent.relative_to(Path(os.environ["RATCHET_RUN"], "logs")))
    if sys.orig_argv[1:4] == ["-m", "pipelines", "run"]:
        return "driver", None
    return ("supervisor" if "pipelines.execution.supervisor" in sys.orig_argv else "nobody"), None


def forks() -> bool:
    """Whether others are forked from this process, which then meet the faults."""
    return "contracts.warm" in sys.orig_argv


class Faults:
    """The faults that this process may meet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: tuple[int, str | None] | None = None
        self.reached: Counter[str] = Counter()
        self.waiting: list[Fault] = []
        self.look()

    def look(self) -> None:
        """See who this process is: one that was forked, or that runs another stage, has become somebody else."""
        now = (os.getpid(), os.environ.get("RATCHET_ATTEMPT"))
        if now == self.known:
            return
        self.known = now
        self.who, self.stage = identity()
        self.reached.clear()
        found = [json.loads(path.read_bytes()) for path in sorted(self.folder.glob("*.json"))]
        self.waiting = [fault for fault in found if fault["who"] == self.who]

    def due(self, point: str, stage: str | None) -> Fault | None:
        """The fault that is due at a point, for whoever takes it."""
        self.reached[point] += 1
        for fault in self.waiting:
            if fault["point"] == point and fault["stage"] == stage and self.reached[point] >= fault["occurrence"]:
                return fault
        return None

    def take(self, fault: Fault, path: Path | None) -> bool:
        """Make a fault this process's own; False if somebody was faster."""
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
        """The work has got to a point, where `path` is being written: meet the fault that is due, if any."""
        self.look()
        fault = self.due(point, stage or self.stage)
        if fault is not None and self.take(fault, path):
            self.strike(fault, path)

    def later(self, point: str, stage: str | None = None) -> None:
        """The same, but the fault strikes some time later, whatever the work does then."""
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
            if action == "torn" or path.suffix == ".tmp":  # a full disk cuts what is being written, and nothing else
                damage(path, fault)
            if action == "torn":
                kill("self")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def kill(victim: str) -> None:
    """SIGKILL for this process, its whole group, or its supervisor, which takes this process with it."""
    if victim == "group":
        os.killpg(0, signal.SIGKILL)
    supervisor = int(os.environ.get(SUPERVISOR, "0"))
    there = supervisor and Path(f"/proc/{supervisor}").exists()
    os.kill(supervisor if victim == "supervisor" and there else os.getpid(), signal.SIGKILL)


def damage(path: Path, fault: Fault) -> None:
    """Cut a file at a random place, or zero what is behind it, as a write that was not flushed may leave it."""
    if not path.is_file():
        return
    size = path.stat().st_size
    os.truncate(path, int(size * fault["share"]))
    if fault["zeros"]:
        os.truncate(path, size)


# Where the points are.


def on_rename(faults: Faults, source: Path, target: Path) -> None:
    """What is about to be renamed tells which point this is."""
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
    """Called by the interpreter before it does anything of note."""
    if event == "os.rename":
        on_rename(faults, Path(os.fsdecode(arguments[0])), Path(os.fsdecode(arguments[1])))


def publication(faults: Faults, module: ModuleType) -> None:
    """contracts.publication"""
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
    """contracts.jsonl"""
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
    """contracts.stage"""
    progress = module.Context.progress

    @functools.wraps(progress)
    def new_progress(self: Any, done: int, total: int, unit: str) -> None:
        if unit == "steps":
            faults.note(step=done)
            faults.later("step")
        progress(self, done, total, unit)

    module.Context.progress = new_progress


def state(faults: Faults, module: ModuleType) -> None:
    """training.state"""
    save = module.TrainingState.save

    @functools.wraps(save)
    def new_save(self: Any, log: list[Any]) -> None:
        save(self, log)
        faults.note(saved=len(log))
        faults.point("saved", self.path)

    module.TrainingState.save = new_save


def supervisor(faults: Faults, module: ModuleType) -> None:
    """pipelines.execution.supervisor"""
    start = module._start

    @functools.wraps(start)
    def new_start(request: Any, environment: dict[str, str], log: Any) -> Any:
        attempt = environment["RATCHET_ATTEMPT"]
        process = start(request, {**environment, SUPERVISOR: str(os.getpid())}, log)
        faults.later("spawned", attempt.rpartition("/logs/")[2].rpartition("/attempt-")[0])
        return process

    module._start = new_start  # type: ignore[attr-defined]


def rundir(faults: Faults, module: ModuleType) -> None:
    """pipelines.run.directory"""
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
    """pipelines.run.points"""
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
    """pipelines.execution.executors.local"""
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
    """Patches a module as soon as it is imported, before anybody can take a function from it."""

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
    """Let this process meet its faults."""
    faults = Faults(folder)
    if faults.who == "nobody" and not forks():
        return
    sys.meta_path.insert(0, Patcher(faults))
    sys.addaudithook(lambda event, arguments: audit(faults, event, arguments))


if CHAOS in os.environ:
    install(Path(os.environ[CHAOS]))
