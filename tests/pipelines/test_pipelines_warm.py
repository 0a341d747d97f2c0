"""Forks of a process that has imported a package: in every respect what a new process would be."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pipelines_cluster import wait_for
from pipelines_smallest import FinishedRun, pipeline

from contracts import forks
from contracts.artifacts import Artifact
from contracts.forks import KILLED, WARM_SOCKET, ForkedProcess, fork
from contracts.manifest import MANIFEST
from contracts.versions import source_version
from contracts.warm import MOST_WAITING, ForkRequest
from pipelines.config.load import load_run_config
from pipelines.execution.executors import local
from pipelines.execution.executors.base import Site
from pipelines.execution.executors.local import LocalExecutor
from pipelines.execution.supervisor import AttemptRequest
from pipelines.execution.warm import WarmProcesses
from pipelines.job import ENTRY
from pipelines.planning.placement import placed_graph
from pipelines.run.directory import RunDirectory

MAIN = """
import json, os, signal, sys, time

import toy.costly
from contracts import resident

UPDATES = {"never": None, "always": lambda value: value.append("new"), "fails": lambda value: 1 / 0}
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
if what == "keep":
    like, content, update = rest
    how = UPDATES[update]
    value, start = resident.hold("thing", fixed=like, content=content, open_=lambda: [os.getpid()], update=how)
    print(json.dumps({"start": start, "value": value, "pid": os.getpid(), "whose": os.environ["WHOSE"]}))
    sys.exit(0)
if what == "replicas":
    from contracts import workers
    from contracts.attempt import ROLE
    from contracts.forks import WARM_LABEL

    if ROLE not in os.environ:
        os.environ[WARM_LABEL] = "r"
        workers._run_replicas(int(rest[0]), 0)
        sys.exit(0)
    rank, cores = os.environ["RANK"], sorted(os.sched_getaffinity(0))
    update = UPDATES["always"]
    thing, start = resident.hold(rank, fixed="x", content=rest[1], open_=lambda: [os.getpid()], update=update)
    line = json.dumps({"rank": rank, "start": start, "opened": thing[0], "pid": os.getpid(), "cores": cores}) + "\\n"
    os.write(2, line.encode())
    sys.exit(int(rest[2]) if rank == "2" else 0)
if what == "tidy":
    import subprocess

    tidies = "import sys; print(flush=True); sys.stdin.read(); open(sys.argv[1], 'x').close()"
    pipe = subprocess.PIPE
    helper = subprocess.Popen([sys.executable, "-c", tidies, rest[0]], stdin=pipe, stdout=pipe)
    helper.stdout.readline()
    resident.hold("thing", fixed="x", content="1", open_=lambda: helper)
    sys.exit(0)
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
        (package / "preload.py").write_text("def preload(libraries):\n    import toy.costly\n")
        (package / "__main__.py").write_text(MAIN)
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{folder / 'code'}:{Path(__file__).parents[2]}",
            "WHOSE": "all",
        }
        self.processes = WarmProcesses(folder / "logs")
        self.log = folder / "stage.log"
        self.path = self.processes.address("toy", sys.executable, self.environment, str(folder))

    def fork(
        self, *arguments: str, source: str | None = None, label: str = "", patience: float = 60.0
    ) -> ForkedProcess | None:
        """Have a stage forked."""
        argv = [sys.executable, "-m", "toy", *arguments]
        variables = {**self.environment, "WHOSE": "mine"}
        source = source_version("toy") if source is None else source
        with self.log.open("ab") as log:
            return fork(self.path, argv, variables, str(self.folder / "code"), source, log, patience, label)

    def started(self, *arguments: str, label: str = "") -> ForkedProcess:
        """A stage that was forked."""
        stage = self.fork(*arguments, label=label)
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


def wait(stage: ForkedProcess) -> int:
    deadline = time.monotonic() + 200
    while (code := stage.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return code


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 200
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


def keep(warm: Warm, like: str, content: str, update: str, label: str = "a") -> dict[str, Any]:
    """What a stage says that keeps a thing."""
    stage = warm.started("keep", like, content, update, label=label)
    assert wait(stage) == 0
    assert stage.waits
    return warm.said()


def test_what_a_stage_has_opened_is_there_for_the_next_one(warm: Warm) -> None:
    first = keep(warm, "x", "1", "never")
    assert (first["start"], first["value"]) == ("loaded", [first["pid"]])
    again = keep(warm, "x", "1", "never")
    assert again == {**first, "start": "kept"}
    updated = keep(warm, "x", "2", "always")
    assert updated == {**first, "start": "updated", "value": [first["pid"], "new"]}
    assert keep(warm, "x", "3", "fails") == {**first, "start": "loaded"}
    assert "ZeroDivisionError" in warm.log.read_text()
    assert keep(warm, "y", "3", "always") == {**first, "start": "loaded"}


def test_nothing_is_there_for_stages_of_another_label_or_of_none(warm: Warm) -> None:
    first = keep(warm, "x", "1", "always")
    assert keep(warm, "x", "1", "always", label="b")["pid"] != first["pid"]
    stage = warm.started("keep", "x", "1", "always")
    assert wait(stage) == 0
    assert not stage.waits
    assert warm.said()["start"] == "loaded"
    assert is_gone(stage.pid)


def test_a_stage_that_fails_leaves_no_process(warm: Warm) -> None:
    first = keep(warm, "x", "1", "always")
    stage = warm.started("say", "7", label="a")
    assert (stage.pid, wait(stage), stage.waits) == (first["pid"], 7, False)
    assert is_gone(stage.pid)
    assert keep(warm, "x", "1", "always")["start"] == "loaded"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_waits_and_dies_or_hangs_costs_a_start(warm: Warm, number: signal.Signals) -> None:
    first = keep(warm, "x", "1", "always")
    os.kill(first["pid"], number)
    second = keep(warm, "x", "1", "always")
    assert second["start"] == "loaded"
    assert is_gone(first["pid"])


def test_what_a_process_has_started_cleans_up_behind_it(warm: Warm) -> None:
    """Such as the process that gives shared memory back, which is in the same group."""
    tidied = warm.folder / "tidied"
    stage = warm.started("tidy", str(tidied), label="a")
    assert wait(stage) == 0
    assert stage.waits
    warm.processes.release(set(), keep="")
    assert is_gone(stage.pid)
    assert tidied.exists()


def test_what_is_kept_is_given_back(warm: Warm) -> None:
    kept, other = (keep(warm, "x", "1", "always", label=label)["pid"] for label in "ab")
    warm.processes.release(set(), keep="a")
    assert is_gone(other)
    assert keep(warm, "x", "1", "always")["pid"] == kept
    warm.processes.release(set(), keep="")
    assert is_gone(kept)


def test_no_more_than_some_wait(warm: Warm) -> None:
    pids = [keep(warm, "x", "1", "always", label=label)["pid"] for label in "abcdef"]
    assert [is_gone(pid) for pid in pids[: len(pids) - MOST_WAITING]] == [True] * (len(pids) - MOST_WAITING)
    assert all(Path(f"/proc/{pid}").exists() for pid in pids[-MOST_WAITING:])


def replicas(warm: Warm, count: int, content: str, code: int = 0) -> list[dict[str, Any]]:
    """What the replicas of a stage say that fails if the second of them ends with a code."""
    warm.environment[WARM_SOCKET] = str(warm.path)
    before = len(warm.log.read_text().splitlines()) if warm.log.exists() else 0
    stage = warm.started("replicas", str(count), content, str(code), label="r")
    assert (wait(stage) == 0) == (code == 0)
    assert not stage.waits, "the stage itself has opened nothing"
    lines = [line for line in warm.log.read_text().splitlines()[before:] if line.startswith("{")]
    return sorted((json.loads(line) for line in lines), key=lambda said: str(said["rank"]))


def test_replicas_stay_for_those_of_the_next_stage(warm: Warm) -> None:
    first = replicas(warm, 2, "1")
    assert [said["start"] for said in first] == ["loaded"] * 2
    assert len({said["pid"] for said in first}) == 2
    assert replicas(warm, 2, "2") == [{**said, "start": "updated"} for said in first]
    os.kill(first[0]["pid"], signal.SIGKILL)
    is_gone(first[0]["pid"])
    third = replicas(warm, 2, "2")
    assert [said["start"] for said in third] == ["loaded", "kept"]
    assert third[1] == {**first[1], "start": "kept"}


def test_replicas_count_as_one_of_those_that_wait(warm: Warm) -> None:
    many = MOST_WAITING + 1
    first = replicas(warm, many, "1")
    others = [keep(warm, "x", "1", "always", label=label)["pid"] for label in "abc"]
    assert replicas(warm, many, "1") == [{**said, "start": "kept"} for said in first]
    keep(warm, "x", "1", "always", label="d")
    assert is_gone(others[0])
    assert all(Path(f"/proc/{pid}").exists() for pid in others[1:])
    warm.processes.release(set(), "r")
    assert [is_gone(pid) for pid in others] == [True] * 3
    assert all(Path(f"/proc/{said['pid']}").exists() for said in first)
    warm.processes.release(set(), "a")
    assert all(is_gone(said["pid"]) for said in first)


def test_a_replica_that_fails_ends_its_stage_and_the_next_starts_anew(warm: Warm) -> None:
    first = replicas(warm, 2, "1")
    replicas(warm, 2, "1", code=3)
    assert is_gone(first[1]["pid"])
    assert replicas(warm, 2, "1")[1]["start"] == "loaded"


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


def test_a_client_that_ends_before_it_has_read_the_answer_ends_its_fork_alone(warm: Warm) -> None:
    other = warm.started("hang")
    wait_for(lambda: "hangs" in warm.log.read_text())
    request = ForkRequest(["-m", "toy", "hang"], warm.environment, str(warm.folder / "code"), source_version("toy"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, warm.log.open("wb") as log:
        connection.connect(str(warm.path))
        socket.send_fds(connection, [msgspec.json.encode(request) + b"\n"], [log.fileno()] * 2)
        wait_for(lambda: warm.log.read_text().endswith("\n"))
    assert is_gone(int(warm.log.read_text().split()[-1]))
    assert other.poll() is None
    assert wait(warm.started("say", "0")) == 0


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


def test_the_directory_for_temporary_files_may_have_a_long_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than that of a socket can be, as on clusters."""
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    warm = Warm(tmp_path)
    assert wait(warm.started("say", "0")) == 0
    warm.processes.close()
    assert not warm.path.parent.exists()


def test_a_package_that_cannot_be_imported_is_started_as_always(tmp_path: Path) -> None:
    warm = Warm(tmp_path)
    (tmp_path / "code/toy/preload.py").write_text("raise ImportError('no such library')")
    warm.processes.close()
    warm.processes = WarmProcesses(tmp_path / "logs")
    path = warm.processes.address("toy", sys.executable, warm.environment, str(tmp_path))
    with warm.log.open("ab") as log:
        argv = [sys.executable, "-m", "toy", "say", "0"]
        patience = 1000.0  # not waited for: it is known at once that the process has died
        assert fork(path, argv, warm.environment, str(tmp_path), source_version("toy"), log, patience) is None
    assert "no such library" in (tmp_path / "logs/toy.log").read_text()
    warm.processes.close()


IMPORTS_FOR_EVER = """
import os, pathlib, time
def preload(libraries):
    pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
    time.sleep(1000)
"""
WAITS_FOR = """
import os, time
def preload(libraries):
    while not os.path.exists('{}'):
        time.sleep(0.01)
    import toy.costly
"""
STARTS_ONE = """
import os, pathlib, sys, time
from pipelines.execution.warm import WarmProcesses
folder = pathlib.Path(sys.argv[1])
WarmProcesses(folder / "logs").address("toy", sys.executable, os.environ, str(folder))
time.sleep(1000)
"""


def test_a_driver_that_is_killed_takes_along_what_still_imports(tmp_path: Path) -> None:
    warm = Warm(tmp_path)
    warm.processes.close()
    (tmp_path / "code/toy/preload.py").write_text(IMPORTS_FOR_EVER)
    driver = subprocess.Popen([sys.executable, "-c", STARTS_ONE, tmp_path], env=warm.environment)
    told = tmp_path / "code/toy/pid"
    wait_for(lambda: told.exists() and told.read_text() != "", 200, "it imports")
    driver.kill()
    driver.wait()
    assert is_gone(int(told.read_text()))


def test_who_does_not_wait_for_the_imports_is_not_answered_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage without libraries is started as always, and so is one for which they take too long."""
    warm = Warm(tmp_path)
    warm.processes.close()
    release = tmp_path / "release"
    (tmp_path / "code/toy/preload.py").write_text(WAITS_FOR.format(release))
    warm.path = warm.processes.address("toy", sys.executable, warm.environment, str(tmp_path))
    assert warm.fork("say", "0", patience=0.0) is None
    with monkeypatch.context() as patch:
        patch.setattr(forks, "ANSWER_SECONDS", 0.1)
        assert warm.fork("say", "0", patience=0.1) is None
    release.touch()
    assert wait(warm.started("say", "0")) == 0
    assert len(warm.log.read_text().splitlines()) == 1
    assert warm.fork("say", "0", patience=0.0) is not None
    warm.processes.close()


def test_libraries_are_imported_one_stage_ahead(smallest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an environment that several stages with models need, when one that another waits for is started."""
    begun: list[str] = []
    monkeypatch.setattr(local, "stage_request", lambda *_, **__: AttemptRequest(["python"], {}, [], "", "", None))
    monkeypatch.setattr(LocalExecutor, "_can_preload", lambda *_: True)
    monkeypatch.setattr(LocalExecutor, "_address", lambda _, node, *__: begun.append(node.environment))

    def begun_by(*names: str) -> list[str]:
        begun.clear()
        executor = LocalExecutor(Site(run, graph, config, ENTRY))
        for name in names:
            executor._import_in_advance(graph.nodes[name])
        return begun

    config = load_run_config(smallest, [])
    run = RunDirectory(config.run_directory)
    graph = placed_graph(config, 2)
    assert begun_by("prompts/heldout") == ["generation"]
    assert begun_by("setup/world", "setup/world") == ["training"]
    assert begun_by("setup/world", "setup/sft") == ["training", "generation", "annotation"]
    assert begun_by("iteration-002/heldout/gold") == []
    for name, node in graph.nodes.items():  # one generation is left
        if node.environment == "generation" and name != "iteration-002/heldout/generation":
            node.output.mkdir(parents=True)
            (node.output / MANIFEST).touch()
    assert begun_by("iteration-002/training") == ["training"]
    for node in graph.nodes.values():  # by an earlier command with other settings
        node.output.mkdir(parents=True, exist_ok=True)
        (node.output / MANIFEST).touch()
    assert begun_by("setup/sft") == ["training", "generation", "annotation"]
    assert begun_by("iteration-002/training") == []


@pytest.mark.timeout(900)
def test_stages_that_are_forked_publish_the_same_bytes(finished_run: FinishedRun, tmp_path: Path) -> None:
    """Real stages, one of each environment; in the other run those that load a model come out of one process, and some
    find it loaded."""
    cold = tmp_path / "smallest"
    shutil.copytree(finished_run.path, cold, ignore=shutil.ignore_patterns("logs", "iteration-00[12]"))
    anew = ["setup/reward-model/training", "iteration-000/heldout/generation", "iteration-000/heldout/reward"]
    for place in anew:
        shutil.rmtree(cold / place)
    command = ["run", str(finished_run.config), f"directory={tmp_path}", "executor.warm=false", "--iters", "0"]
    done = pipeline(*command)
    assert done.returncode == 0, done.stderr
    for place in anew:
        digests = [Artifact.open(run / place).manifest.digest for run in (cold, finished_run.path)]
        assert digests[0] == digests[1], place
    forked = {
        run: sum(bool(json.loads(path.read_bytes())["warm"]) for path in run.rglob("request.json"))
        for run in (cold, finished_run.path)
    }
    assert forked[cold] == 0
    assert len(list(cold.rglob("request.json"))) == len(anew), "the others are not made again"
    assert forked[finished_run.path] > 10
    assert {Artifact.open(cold / place).manifest.facts["start"] for place in anew[1:]} == {"loaded"}
    assert "kept" in set(starts_of(finished_run.path))


def starts_of(run: Path) -> Iterator[str]:
    """How the stages of a run came to their engines and models."""
    for path in run.glob("*/**/manifest.json"):
        if start := Artifact.open(path.parent).manifest.facts.get("start"):
            yield start
