"""Forks of a process that has imported a package: in every respect what a new process would be."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipelines_smallest import FinishedRun, pipeline

from contracts.artifacts import Artifact
from contracts.versions import source_version
from pipelines.execution.warm import KILLED, ForkedStage, WarmProcesses, fork

MAIN = """
import json, os, signal, sys, time

import toy.costly

what, rest = sys.argv[1], sys.argv[2:]
if what == "say":
    stat = os.fstat(0)
    print(json.dumps({
        "argv": sys.argv[1:], "rest": sys.orig_argv[1:], "variables": dict(os.environ), "directory": os.getcwd(),
        "leads": os.getpgid(0) == os.getpid() == os.getsid(0), "imported": toy.costly.pid, "pid": os.getpid(),
        "name": __name__, "descriptors": len(os.listdir("/proc/self/fd")),
    }))
    sys.exit(int(rest[0]))
if what == "hang":
    print("hangs", os.getpid(), flush=True)
    time.sleep(1000)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
raise ValueError(what)
"""


class Warm:
    """A process that has imported the package `toy`."""

    def __init__(self, folder: Path) -> None:
        package = folder / "code" / "toy"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "costly.py").write_text("import os\npid = os.getpid()\n")
        (package / "preload.py").write_text("def preload():\n    import toy.costly\n")
        (package / "__main__.py").write_text(MAIN)
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{folder / 'code'}:{Path(__file__).parents[2]}",
            "WHOSE": "all",
        }
        self.processes = WarmProcesses(folder / "logs")
        self.log = folder / "stage.log"
        address = self.processes.address("toy", sys.executable, self.environment, str(folder), start=True)
        assert address is not None
        self.path = address

    def fork(self, *arguments: str, source: str | None = None) -> ForkedStage | None:
        """Have a stage forked."""
        argv = [sys.executable, "-m", "toy", *arguments]
        variables = {**self.environment, "WHOSE": "mine"}
        source = source_version("toy") if source is None else source
        with self.log.open("ab") as log:
            return fork(self.path, argv, variables, str(self.folder / "code"), source, log, 60.0)

    def started(self, *arguments: str) -> ForkedStage:
        """A stage that was forked."""
        stage = self.fork(*arguments)
        assert stage is not None
        return stage

    def said(self) -> dict[str, Any]:
        """What the last stage has said."""
        return dict(json.loads(self.log.read_text().splitlines()[-1]))


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[Warm]:
    """One that is ended."""
    found = Warm(tmp_path)
    yield found
    found.processes.close()


def wait(stage: ForkedStage) -> int:
    deadline = time.monotonic() + 30
    while (code := stage.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return code


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not Path(f"/proc/{pid}").exists()


def test_a_fork_is_what_a_new_process_is(warm: Warm) -> None:
    assert wait(warm.started("say", "7")) == 7
    forked = warm.said()
    command = [sys.executable, "-m", "toy", "say", "7"]
    variables = {**warm.environment, "WHOSE": "mine"}
    with warm.log.open("ab") as log:
        place = {"env": variables, "cwd": warm.folder / "code", "stdin": subprocess.DEVNULL, "stdout": log}
        code = subprocess.run(command, start_new_session=True, check=False, **place).returncode  # type: ignore[call-overload]
    assert code == 7
    new = warm.said()
    assert forked.pop("imported") != forked["pid"]
    assert new.pop("imported") == new["pid"]
    for said in (forked, new):
        del said["pid"]
        said["variables"].pop("_", None)
    assert forked == new


def test_several_at_once_with_their_own_ends(warm: Warm) -> None:
    stages = [warm.started("say", str(code)) for code in (0, 3)] + [warm.started("kill"), warm.started("nonsense")]
    assert [wait(stage) for stage in stages] == [0, 3, -signal.SIGKILL, 1]
    assert "ValueError: nonsense" in warm.log.read_text()


def test_signals_reach_it(warm: Warm) -> None:
    stage = warm.started("hang")
    stage.send_signal(signal.SIGTERM)
    assert wait(stage) == -signal.SIGTERM


def test_other_source_is_imported_anew(warm: Warm) -> None:
    assert warm.fork("say", "0", source="another version") is None
    assert wait(warm.started("say", "0")) == 0


def test_what_was_forked_ends_with_who_asked_for_it(warm: Warm) -> None:
    stage = warm.started("hang")
    stage._connection.close()
    assert is_gone(stage.pid)


def test_a_killed_process_takes_its_forks_along_and_costs_nothing_but_time(warm: Warm) -> None:
    stage = warm.started("hang")
    (process,) = warm.processes._processes.values()
    process.kill()
    assert wait(stage) == KILLED
    assert warm.fork("say", "0") is None
    os.killpg(stage.pid, signal.SIGKILL) if not is_gone(stage.pid) else None


def test_nothing_is_left_when_the_driver_ends(tmp_path: Path) -> None:
    warm = Warm(tmp_path)
    stage = warm.started("hang")
    (process,) = warm.processes._processes.values()
    warm.processes.close()
    assert is_gone(stage.pid)
    assert process.returncode is not None
    assert not warm.path.parent.exists()


def test_a_package_that_cannot_be_imported_is_started_as_always(tmp_path: Path) -> None:
    warm = Warm(tmp_path)
    (tmp_path / "code/toy/preload.py").write_text("raise ImportError('no such library')")
    warm.processes.close()
    warm.processes = WarmProcesses(tmp_path / "logs")
    path = warm.processes.address("toy", sys.executable, warm.environment, str(tmp_path), start=True)
    assert path is not None
    with warm.log.open("ab") as log:
        argv = [sys.executable, "-m", "toy", "say", "0"]
        assert fork(path, argv, warm.environment, str(tmp_path), source_version("toy"), log, 3.0) is None
    assert "no such library" in (tmp_path / "logs/toy.log").read_text()
    warm.processes.close()


@pytest.mark.timeout(900)
def test_stages_that_are_forked_publish_the_same_bytes(finished_run: FinishedRun) -> None:
    """Real stages, of which all that load a model of an environment come out of one process."""
    options = ["name=warm", "executor.warm=true", "--iters", "1"]
    done = pipeline("run", str(finished_run.config), *options)
    assert done.returncode == 0, done.stderr
    warm = finished_run.path.parent / "warm"
    found = {path.parent.relative_to(warm) for path in warm.glob("*/**/manifest.json")}
    assert len(found) > 20
    for place in found:
        digests = [Artifact.open(run / place).manifest.digest for run in (warm, finished_run.path)]
        assert digests[0] == digests[1], place
    forked = [path for path in warm.rglob("request.json") if json.loads(path.read_bytes())["warm"]]
    imported = Artifact.open(warm / "iteration-001/reward").manifest.seconds["load"]
    assert len(forked) > 5
    assert imported < Artifact.open(finished_run.path / "iteration-001/reward").manifest.seconds["load"]
