"""Fixtures of the tests of pipelines."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, NoBrowser
from missing_tools import skip_or_fail
from pipelines_cluster import Cluster, ClusterRefused, FakeCluster, Slurm
from pipelines_slurm_run import digests
from pipelines_smallest import FinishedRun, finish_smallest, pipeline, write_pretended, write_smallest
from reported import ReportedRun
from warm_asking import ask_warm, interpreters, socket_of_asked

import pipelines.doctor.checks
import pipelines.planning.inspection
from pipelines.environments.locked import interpreter


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """The config file of the smallest run."""
    return write_smallest(tmp_path)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with spaces in its name, shared by all test processes (scripts/run_tests.py)."""
    given = os.environ.get("SHARED_BY_TESTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("shared")
    (folder / "end to end").mkdir(exist_ok=True)
    return folder / "end to end"


@pytest.fixture(scope="session")
def shared_smallest(shared: Path) -> Path:
    """The config file of a run that several test files share."""
    with file_lock(shared / "smallest.lock"):
        path = shared / "smallest.yaml"
        return path if path.exists() else write_smallest(shared)


@pytest.fixture(scope="session")
def finished_run(shared: Path, shared_smallest: Path) -> FinishedRun:
    """An uninterrupted run of two iterations, executed by the first test that needs it. Tests must not change it."""
    with file_lock(shared / "finished.lock"):
        path = shared / "finished.json"
        if not path.exists():
            run = finish_smallest(shared_smallest)
            path.write_text(json.dumps({"output": run.output, "command_lines": list(run.command_lines)}))
        stored = json.loads(path.read_text())
        return FinishedRun(shared_smallest, stored["output"], set(stored["command_lines"]))


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """A context that only one process at a time can enter."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster of four nodes, shared by all tests that use it.

    If none can run on this machine, these tests are skipped with a warning in the summary; with CI=true, they fail.
    """
    try:
        cluster = Cluster(tmp_path_factory.mktemp("slurm") / "state")
    except ClusterRefused as refusal:
        skip_or_fail(f"SLURM IS NOT TESTED: {refusal}")
    yield cluster
    cluster.end()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless browser, shared by all tests that use it.

    If there is none on this machine, these tests are skipped with a warning in the summary; with CI=true, they fail.
    """
    try:
        browser = Browser()
    except NoBrowser as missing:
        skip_or_fail(f"NO PAGE IS TESTED: {missing}")
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def fake_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    """A fake Slurm cluster, shared by all tests that use it."""
    fake = FakeCluster(tmp_path_factory.mktemp("fake") / "slurm")
    yield fake
    fake.end()


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.cluster)])
def slurm(request: pytest.FixtureRequest) -> Slurm:
    """The fake cluster, and in the tier `cluster` the real one."""
    found: Slurm = request.getfixturevalue("fake_cluster" if request.param == "fake" else "cluster")
    return found


@pytest.fixture(scope="session")
def pretended_run(shared: Path) -> Path:
    """The directory of a local run of one iteration with fake stages, executed by the first test that needs it. Tests
    must not change it."""
    folder, finished = shared.parent / "pretended", shared / "pretended.finished"
    with file_lock(shared / "pretended.lock"):
        if not finished.exists():
            folder.mkdir()
            config = write_pretended(folder, executor={"kind": "inline"})
            result = pipeline("run", str(config), "--iters", "1")
            assert result.returncode == 0, result.stderr
            finished.touch()
    return folder / "runs" / "pretended"


@pytest.fixture(scope="session")
def pretended(pretended_run: Path) -> dict[str, str]:
    """The digests of the artifacts of `pretended_run` by stage."""
    return digests(pretended_run)


@pytest.fixture(scope="session")
def world(shared: Path, root: Path) -> Path:
    """The toy task's model, created by its stage for the first test that needs it. Tests must not change it."""
    output = shared.parent / "world"
    sizes = ("demonstrations=1", "train=1", "preference=1", "heldout=1")
    command = [str(interpreter("training", "cpu")), "-m", "embedded", "world", *sizes, f"output={output}"]
    with file_lock(shared / "world.lock"):
        if not output.exists():
            subprocess.run(command, check=True, timeout=300, capture_output=True, cwd=root)
    return output / "model"


@pytest.fixture
def warm_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process and its forks ask environments in forks (warm_asking.py)."""
    interpreters()
    socket_of_asked()
    for module in (pipelines.planning.inspection, pipelines.doctor.checks):
        monkeypatch.setattr(module, "ask", ask_warm)


@pytest.fixture(scope="session")
def reported_run(tmp_path_factory: pytest.TempPathFactory) -> ReportedRun:
    """A handmade run for reports. Tests must not change it."""
    return ReportedRun(tmp_path_factory.mktemp("reported")).build()


@pytest.fixture
def run(reported_run: ReportedRun, tmp_path: Path) -> Path:
    """A copy of the handmade run for reports."""
    path = tmp_path / "runs" / "handmade"
    shutil.copytree(reported_run.path, path)
    return path
