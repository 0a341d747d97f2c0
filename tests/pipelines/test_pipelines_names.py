"""Recipes by name: from any directory, a file of the user's first, and the same name continues the same run."""

import json
from pathlib import Path

import pytest

from contracts.errors import UserError
from pipelines.config.load import load_run_config
from pipelines.config.recipes import find_config, recipes
from pipelines.iteration import build_graph
from pipelines.main import main
from pipelines.run.directory import RunDirectory


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_those_of_the_runs(here: Path) -> None:
    for name in recipes():
        assert load_run_config(name, []).name == name


def test_a_file_of_the_users_comes_before_a_recipe(here: Path) -> None:
    (here / "smollm2").mkdir()
    assert find_config("smollm2") == recipes()["smollm2"]
    (here / "quickstart").write_text("name: mine")
    assert find_config("quickstart") == Path("quickstart")


def test_data_that_come_with_a_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = build_graph(load_run_config("smollm2", []), 0)
    assert {graph.nodes[f"prompts/{name}"].config.source.is_file() for name in ("train", "heldout")} == {True}
    assert main(["run", "smollm2", "--dry-run", "prompts.train.source=ratchet:data/topics.jsonl"]) == 2
    message = capsys.readouterr().err
    assert "ratchet:data/topics.jsonl does not exist" in message
    assert "data/topics-train.jsonl" in message


def test_a_run_remembers_a_recipe_by_its_name(here: Path) -> None:
    """Wherever the recipe lies by then: in another installation, or in a checkout."""
    config = load_run_config("quickstart", [])

    def claim(name: str) -> None:
        RunDirectory(config.run_directory).claim(config, recipes()[name], 1)  # until nobody refers to it

    claim("quickstart")
    marker = config.run_directory / "run.json"
    record = json.loads(marker.read_text())
    assert record["config"] == "recipe:quickstart"
    marker.write_text(json.dumps({**record, "source": "/elsewhere/configs/quickstart.yaml"}))
    claim("quickstart")
    with pytest.raises(UserError, match="is the run of recipe:quickstart, not of"):
        claim("smollm2")
