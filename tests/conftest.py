"""Fixtures that several packages' tests share, and the tiers of the tests."""

import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from contracts import stopping
from contracts.surroundings import THRESHOLD_OF_IMPORTS, imported

# One thread per process, before anything imports torch: the tests share few cores, and results on a CPU depend on the
# number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RATCHET_PROFILES", "off")  # of stages that only pretend to work nobody's predictions are made

gc.set_threshold(*THRESHOLD_OF_IMPORTS)  # until the tests are collected

# The same examples at every run: what is found by chance must not decide whether somebody else's change passes.
# `--hypothesis-profile=default` looks for new ones. None fails because the machine is slow.
hypothesis.settings.register_profile(
    "the same", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("the same")

ROOT = Path(__file__).parents[1]
DURATIONS = ROOT / "tests" / "durations.json"
TIERS = ("slow", "cluster", "chaos")
COSTLY = {"cluster": "cluster"} | dict.fromkeys(("finished_run", "world", "processed", "raw", "together"), "slow")
"""The tier of whoever asks for these fixtures."""
QUICK_SECONDS = 60.0
"""What the variants of a test of the fast loop may take together, in the full command, whose lanes share the cores."""


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def no_power_cut() -> Iterator[None]:
    """What a process has written survives its kill also where it was not flushed; waiting for the disk was a large part
    of the time of those tests that run in this process and in forks of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What a test has the signals do, such as by a command that it calls in this process, ends with it."""
    before = {number: signal.getsignal(number) for number in (*stopping.SIGNALS, *stopping.TERMINAL)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """All is imported."""
    imported()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that ask for a costly fixture in its tier, and refuse slow ones that are in none.

    The tier goes into pytest's report, so that durations are stored by it.
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
