"""What becomes of tests whose machine lacks something that cannot be installed."""

import os
import warnings
from typing import NoReturn

import pytest


def do_without(message: str) -> NoReturn:
    """Skip, with a warning in the summary; with CI=true, fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    pytest.skip(message)
