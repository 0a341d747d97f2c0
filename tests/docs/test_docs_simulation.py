"""The figures and pictures of the page on simulations are what its commands print and draw."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/simulation.md").read_text()
ALONE = {
    **os.environ, "RATCHET_PROFILES": "off", "COLUMNS": "200", "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}  # fmt: skip


def block(language: str) -> str:
    """The page's first one."""
    found = re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)
    assert found is not None
    return found[1]


def drawn(*arguments: str | Path) -> str:
    command = [sys.executable, str(ROOT / "benchmarks/strategies.py"), *map(str, arguments)]
    return subprocess.run(command, env=ALONE, check=True, capture_output=True, text=True).stdout


def test_the_worked_example_says_what_its_command_prints(tmp_path: Path) -> None:
    ran = subprocess.run(
        ["bash", "-e", "-c", block("bash")], cwd=tmp_path, env=ALONE, check=True, capture_output=True, text=True
    )
    assert " ".join(block("text").split()) in " ".join(ran.stdout.split())


@pytest.mark.slow
def test_the_pictures_are_those_that_their_command_draws(tmp_path: Path) -> None:
    drawn("pictures", tmp_path)
    pictures = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert pictures == sorted(re.findall(r"\(images/(.*?\.svg)\)", PAGE))
    for name in pictures:
        assert (tmp_path / name).read_bytes() == (ROOT / "docs/images" / name).read_bytes(), name


@pytest.mark.slow
def test_the_tables_have_the_times_that_their_commands_print() -> None:
    shown = {frozenset(re.findall(r"\d+\.\d s", line)) for line in PAGE.splitlines() if line.startswith("|")}
    for what in ("real", "app"):
        lines = [frozenset(re.findall(r"\d+\.\d s", line)) for line in drawn(what).splitlines()]
        assert any(lines)
        assert {times for times in lines if times} <= shown, what
