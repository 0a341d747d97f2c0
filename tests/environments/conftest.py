"""Fixtures of the tests of environments."""

from pathlib import Path

import pytest
from environments_checkout import Checkout


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Checkout:
    """A copy of the repository whose locks name stand-ins."""
    return Checkout(root, tmp_path / "check out", tmp_path)
