"""Fixtures of the driver's tests."""

import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipelines_cluster import Cluster, ClusterRefused
from pipelines_smallest import FinishedRun, finish_smallest, write_smallest

from pipelines.environments.locked import interpreter


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """Config file of the smallest run."""
    return write_smallest(tmp_path)


@pytest.fixture(scope="session")
def shared_smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config file of a run that several files share, in a directory with spaces in its name."""
    return write_smallest(tmp_path_factory.mktemp("end to end"))


@pytest.fixture(scope="session")
def finished_run(shared_smallest: Path) -> FinishedRun:
    """A run of two iterations that nothing interrupted; nobody changes what it has published."""
    return finish_smallest(shared_smallest)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster of four nodes, shared by all tests that ask for one.

    Where none can run, these tests are skipped, with a warning in the summary; with CI=true, they fail.
    """
    try:
        cluster = Cluster(tmp_path_factory.mktemp("slurm") / "state")
    except ClusterRefused as refusal:
        message = f"SLURM IS NOT TESTED: {refusal}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        warnings.warn(message, RuntimeWarning, stacklevel=1)
        pytest.skip(message)
    yield cluster
    cluster.end()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The embedded world's model, made by its stage."""
    output = tmp_path_factory.mktemp("world") / "world"
    sizes = ("demonstrations=1", "train=1", "preference=1", "heldout=1")
    command = [str(interpreter("training", "cpu")), "-m", "embedded", "world", *sizes, f"output={output}"]
    subprocess.run(command, check=True, timeout=120, capture_output=True, cwd=root)
    return output / "model"
