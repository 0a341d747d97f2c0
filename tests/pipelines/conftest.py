"""Fixtures of the driver's tests."""

from pathlib import Path

import pytest
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
