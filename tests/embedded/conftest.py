"""Fixtures of the tests of the toy task."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy task of seed 0, created by its command line."""
    output = tmp_path_factory.mktemp("worlds") / "world"
    command = [sys.executable, "-m", "embedded", "world", f"output={output}", "seed=0"]
    subprocess.run(command, timeout=120, check=True)
    return output
