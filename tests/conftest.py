"""Fixtures that several packages' tests share."""

import os
from pathlib import Path

import pytest

# One thread per process, before anything imports torch: the tests share few cores, and results on a CPU depend on the
# number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]
