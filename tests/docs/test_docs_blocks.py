"""The code blocks of the documentation: commands parse, and what can be run is run, with stages that only pretend.

A block of shell or Python is run unless it says `<!-- not run: why -->` in front. One of Python whose first line is
`# name.py` is a file of that name. Pages that tests of their own run are in OWN_TESTS.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pretend import write_interpreter

from annotation.pairing.choice import choose
from annotation.pairing.config import PairsSettings
from annotation.pairing.strategies import STRATEGIES, Candidate, PairPrompt
from contracts.config import docstrings
from pipelines.config.load import load_run_config
from pipelines.environments.locked import MARK, NAMES, Locked
from pipelines.main import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_TESTS = {"algorithms.md", "extending.md", "hooks.md"}
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
NOT_RUN = {
    "README.md": 2,
    "cluster.md": 6,
    "coming-from-trl.md": 1,
    "development-cluster.md": 2,
    "file-formats.md": 1,
    "gates.md": 1,
    "hub.md": 2,
    "parallel.md": 1,
    "planning.md": 1,
    "profiles.md": 1,
    "recipes.md": 1,
    "scorers.md": 1,
    "streaming.md": 1,
    "testing.md": 2,
    "tracking.md": 1,
    "tutorial.md": 3,
}
"""How many blocks of a page are not run."""


@dataclass(frozen=True)
class Block:
    """A block of code."""

    language: str
    text: str
    why: str | None
    """Why it is not run."""


def blocks(page: Path, *languages: str) -> list[Block]:
    found = (Block(match["language"], match["text"], match["why"]) for match in BLOCK.finditer(page.read_text()))
    return [block for block in found if block.language in languages]


def commands(text: str) -> Iterator[list[str]]:
    """The `pipeline` commands in a block of shell, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("[", "").replace("]", "") if "[key=" in line else line, comments=True)
        words = words[: words.index(">")] if ">" in words else words
        if words and words[0].removeprefix(".venv/bin/") == "pipeline":
            yield [re.sub(r"^[NI]$", "1", word) for word in words[1:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_arguments_that_exist(page: Path) -> None:
    for block in blocks(page, "bash"):
        for words in commands(block.text):
            assert callable(parse(words).command), words


def test_how_many_blocks_are_not_run() -> None:
    found = Counter(
        page.name
        for page in PAGES
        if page.name not in OWN_TESTS
        for block in blocks(page, "bash", "python")
        if block.why
    )
    assert dict(found) == NOT_RUN, "a block that cannot be run is counted here, so that it is left out on purpose"


def test_the_shell_of_a_page_is_called_bash() -> None:
    for page in PAGES:
        languages = set(re.findall(r"^```(\w+)$", page.read_text(), re.M))
        assert languages <= {"bash", "python", "yaml", "text", "json"}, page.name


@pytest.mark.parametrize("page", ["scorers.md", "pairs.md", "stages.md", "tracking.md", "hub.md"])
def test_sections_of_a_configuration_are_valid(page: str, tmp_path: Path) -> None:
    base = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    found = blocks(ROOT / "docs" / page, "yaml")
    assert found
    for block in found:
        settings = yaml.safe_load(block.text)
        path = tmp_path / "quickstart.yaml"
        path.write_text(yaml.safe_dump({**base, **settings, "reward_model": None}))
        assert load_run_config(path, []).name == "quickstart"


def test_the_table_of_the_page_of_pairs_has_every_strategy_and_setting() -> None:
    text = (ROOT / "docs/pairs.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| `\w+` \|.*\|.*\|.*\|", line)][1:]
    found = {row[0].strip("| `"): re.findall(r"`(\w+: [^`]+)`", row[2]) for row in rows}
    wanted = {
        name: [f"{setting}: {json.dumps(parameter.default)}" for setting, parameter in strategy.parameters.items()]
        for name, strategy in STRATEGIES.items()
    }
    assert found == wanted
    assert all(name in docstrings(PairsSettings)["strategy"] for name in STRATEGIES)


def test_the_strategy_of_the_page_of_pairs_chooses(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs/pairs.md", "python")
    (tmp_path / "mine.py").write_text(block.text)
    settings = PairsSettings(strategy=f"{tmp_path}/mine.py:sweet_spot", settings={"spread": 0.5})
    scores = [5.0, 4.0, 3.0, 2.0, -9.0]
    candidates = [Candidate(sample, (sample,), score) for sample, score in enumerate(scores)]
    ((chosen, rejected),) = choose(candidates, PairPrompt("p", [], None, [], 0), settings.load()).pairs
    assert (chosen.score, rejected.score) == (5.0, 2.0)


def test_functions_of_the_page_of_scorers_score() -> None:
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs/scorers.md", "python"):
        exec(block.text, names)
    said = {"messages": [{"role": "user", "content": "Capital?"}], "finish_reason": "stop"}
    exact, brief = names["exact"], names["brief"]
    assert exact(response="It is 1,204.", answer="1204", **said) == 1.0
    assert exact(response="It is twelve.", answer="12", **said) == 0.0
    assert exact(response="It is 12.", answer=None, **said) is None
    assert brief(response="one two", answer=None, **said) == -0.04


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in which the tutorial has been followed, with runs by the names that other pages use."""
    folder = tmp_path_factory.mktemp("workplace")
    home = folder / "home"
    (home / "environments").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATCHET_HOME", str(home))
        patch.setenv("RATCHET_VARIANT", "cpu")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        for name in NAMES:
            environment = Locked(name, "cpu").directory
            python = write_interpreter(environment)
            (environment / "bin").mkdir()
            (environment / "bin/python").symlink_to(python)
            (environment / MARK).touch()
        follow(ROOT / "docs/tutorial.md", folder)
        for source, names in {"first": ("NAME", "a"), "second": ("b",)}.items():
            for name in names:
                shutil.copytree(folder / "runs" / source, folder / "runs" / name)
        yield folder


def follow(page: Path, folder: Path) -> None:
    """Do what a page says, block by block."""
    for block in blocks(page, "bash", "python"):
        name = re.match(r"# (\w+\.py)\n", block.text)
        if block.why:
            continue
        if name:
            (folder / name[1]).write_text(block.text)
            continue
        command = ["bash", "-euo", "pipefail"] if block.language == "bash" else [sys.executable, "-"]
        result = subprocess.run(
            command, input=block.text, cwd=folder, capture_output=True, text=True, timeout=500, check=False
        )
        assert result.returncode == 0, f"{page.name}: {block.text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


@pytest.mark.slow
def test_the_tutorial_can_be_followed(workplace: Path) -> None:
    runs = workplace / "runs"
    assert (runs / "first/report.html").stat().st_size > 10_000
    assert (runs / "second/iteration-002/evaluation/manifest.json").exists()
    assert (runs / "first/iteration-002/heldout/short/manifest.json").exists()
    assert not list((runs / "second/logs/setup").glob("*")), "what is shared was made again"
    assert yaml.safe_load((workplace / "mine.yaml").read_text())["name"] == "smollm2"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in OWN_TESTS | {"tutorial.md"}], ids=lambda page: page.name
)
def test_blocks_run(page: Path, workplace: Path) -> None:
    follow(page, workplace)
