"""Fixtures that several packages' tests share, and the tiers of the tests."""

import json
import os
from pathlib import Path

import pytest

# One thread per process, before anything imports torch: the tests share few cores, and results on a CPU depend on the
# number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[1]
DURATIONS = ROOT / "tests" / "durations.json"
TIERS = {"slow", "cluster", "chaos"}
COSTLY = {"cluster": "cluster"} | dict.fromkeys(("finished_run", "world", "processed", "raw", "together"), "slow")
"""The tier of whoever asks for these fixtures."""
QUICK_SECONDS = 10.0
"""What the variants of a test of the fast loop may take together."""


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that ask for a costly fixture in its tier, and refuse slow ones that are in none."""
    stored = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    wrong = set()
    for item in items:
        for fixture in COSTLY.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(COSTLY[fixture])
        file, _, name = item.nodeid.partition("::")
        seconds = stored.get(file, {}).get(name.partition("[")[0], 0.0)
        if seconds > QUICK_SECONDS and not TIERS & {mark.name for mark in item.iter_markers()}:
            wrong.add(f"{file}::{name.partition('[')[0]} takes {seconds:.0f} s, by tests/durations.json")
    if wrong:
        raise pytest.UsageError("\n".join([*sorted(wrong), "Make these quicker, or mark them slow, cluster or chaos."]))
