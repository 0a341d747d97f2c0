"""Skips tests on machines that lack something that cannot be installed."""

import os
import warnings
from typing import NoReturn

import pytest


def skip_or_fail(message: str) -> NoReturn:
    """Skip the test with a warning in the summary; with CI=true, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    pytest.skip(message)
