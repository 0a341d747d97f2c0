"""Fixtures that the tests of several packages share, and the tiers of tests."""

import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from contracts import stopping
from contracts.entrypoint import IMPORT_GC_THRESHOLD, imported

# One thread per process, before anything imports torch: the tests share few cores, and results on a CPU depend on the
# number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RATCHET_PROFILES", "off")  # fake stages must not add to the profiles

gc.set_threshold(*IMPORT_GC_THRESHOLD)  # until the tests are collected

# Every run uses the same examples, so that an unrelated change cannot fail by chance. `--hypothesis-profile=default`
# tries new examples. No example fails because the machine is slow.
hypothesis.settings.register_profile(
    "the same", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("the same")

ROOT = Path(__file__).parents[1]
DURATIONS = ROOT / "tests" / "durations.json"
TIERS = ("slow", "cluster", "chaos")
COSTLY = {"cluster": "cluster"} | dict.fromkeys(("finished_run", "world", "processed", "raw", "together"), "slow")
"""The tiers of tests that use these fixtures."""
QUICK_SECONDS = 60.0
"""The most seconds that all variants of a test without a tier may take in total, measured by the full command, whose
lanes share the cores."""


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def no_power_cut() -> Iterator[None]:
    """Disable fsync: tests kill processes, not machines, and a kill loses no written data. Waiting for the disk would
    take a large part of the time of tests that run in this process and its forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore signal handlers after each test, since commands called in this process change them."""
    before = {number: signal.getsignal(number) for number in (*stopping.SIGNALS, *stopping.TERMINAL)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """Undo the settings for the time of imports."""
    imported()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests with a costly fixture into its tier, and fail if a slow test has no tier.

    The tier is written to pytest's report, so that durations are stored by tier.
    """
    stored = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    wrong = set()
    for item in items:
        for fixture in COSTLY.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(COSTLY[fixture])
        marks = {mark.name for mark in item.iter_markers()}
        tier = next((tier for tier in TIERS if tier in marks), "")
        item.user_properties.append(("tier", tier))
        file, _, name = item.nodeid.partition("::")
        function = name.partition("::")[0].partition("[")[0]
        seconds = stored.get(file, {}).get(function, 0.0)
        if not tier and seconds > QUICK_SECONDS:
            wrong.add(f"{file}::{function} takes {seconds:.0f} s, by tests/durations.json")
    if wrong:
        raise pytest.UsageError("\n".join([*sorted(wrong), "Make these quicker, or mark them slow, cluster or chaos."]))
