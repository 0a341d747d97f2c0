"""Fixtures of the driver's tests."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipelines_cluster import Cluster, ClusterRefused
from pipelines_smallest import FinishedRun, finish_smallest, write_smallest


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
