"""Runs of thousands of stages: what a dry run costs for each, what it says meanwhile, and what is surely a mistake."""

import time
from pathlib import Path

import pytest

from pipelines import progress
from pipelines.main import main


def cost(capsys: pytest.CaptureFixture[str], config: Path, iterations: int) -> tuple[float, int]:
    """CPU seconds of a dry run, and how many stages it has."""
    start = time.process_time()
    assert main(["run", str(config), "--iters", str(iterations), "--dry-run"]) == 0
    seconds = time.process_time() - start
    return seconds, sum(line.startswith("run ") for line in capsys.readouterr().out.splitlines())


@pytest.mark.slow
def test_a_stage_costs_the_same_in_a_long_run(
    smallest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policies stand one on the other, more of them than Python can call functions in each other."""
    monkeypatch.setattr(progress, "PATIENCE", 3600.0)
    cost(capsys, smallest, 1)  # what is asked once in a process
    short, few = cost(capsys, smallest, 110)
    long, many = cost(capsys, smallest, 1100)
    assert many > 9 * few > 5000
    assert long / many < 3 * short / few, "ten times as long, a stage would cost ten times as much"


def test_what_takes_long_says_how_far_it_is(
    smallest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    assert main(["run", str(smallest), "--iters", "2", "--dry-run"]) == 0
    said = capsys.readouterr()
    for what in (
        "planning the iterations: 0 of 2\n",
        "checking what the stages read: 0 of ",
        "estimating memory: 0 of ",
    ):
        assert what in said.err
        assert what not in said.out


@pytest.mark.parametrize("command", ["run", "doctor"])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--iters", "100000"], "--iters is 100000; it must be from 0 to 10000"),
        (["--iters", "-1"], "--iters is -1; it must be from 0 to 10000"),
        (["iterations=20000"], "iterations is 20000; it must be from 0 to 10000"),
        (["--iters", "5000", "accumulate=true"], "--iters is 5000 with accumulate=true"),
    ],
)
def test_a_number_of_iterations_that_is_surely_a_mistake(
    smallest: Path, capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], complaint: str
) -> None:
    start = time.process_time()
    assert main([command, str(smallest), *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert time.process_time() - start < 5
