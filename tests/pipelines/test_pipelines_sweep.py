"""A grid of runs: each stage is made once for all that have its key, and the results are compared."""

from pathlib import Path

import pytest
from pipelines_smallest import pipeline, write_pretended

from contracts.errors import UserError
from contracts.manifest import MANIFEST
from pipelines.main import main
from pipelines.run.directory import RunDirectory
from pipelines.run.events import StageStarted
from pipelines.run.sweep import grid


def test_every_combination_has_a_name_of_its_own() -> None:
    points = grid(["training.settings.beta=[0.1, 0.3]", "generation.k=4", "seed=[1,2]"])
    assert [point.name for point in points] == [
        "beta-0.1_seed-1", "beta-0.1_seed-2", "beta-0.3_seed-1", "beta-0.3_seed-2"
    ]  # fmt: skip
    assert points[2].overrides == ["generation.k=4", "training.settings.beta=0.3", "seed=1"]
    lists = grid(["generation.temperatures=[[0.7, 1.0], [1.0]]", "policy=[a/b, c d]"])
    assert lists[0].name == "temperatures-0.7-1.0_policy-a-b"
    assert lists[0].overrides == ["generation.temperatures=[0.7, 1.0]", 'policy="a/b"']
    assert grid(["training.seed=[1,2]", "seed=[3]"])[0].name == "training.seed-1_seed-3"


def test_a_value_that_is_given_twice_is_one_run() -> None:
    assert [point.name for point in grid(["seed=[1,1,2]", "name=mine"])] == ["seed-1", "seed-2"]


def test_every_mistake_is_told_before_the_first_run(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(smallest), "training.learning_rate=[1e-3,a]"]) == 2
    said = capsys.readouterr()
    assert "learning_rate" in said.err
    assert "run 1" not in said.out


@pytest.mark.parametrize("overrides", [["seed=1"], [], ["seed=[1]"], [f"seed={list(range(300))}"]])
def test_what_is_no_grid(overrides: list[str]) -> None:
    with pytest.raises(UserError, match="a sweep has 2 to 256"):
        grid(overrides)


@pytest.mark.slow
def test_runs_of_a_sweep_share_what_has_the_same_key(tmp_path: Path) -> None:
    command = ["sweep", str(write_pretended(tmp_path)), "training.settings.beta=[0.1,0.3]", "name=mine", "--iters", "1"]
    done = pipeline(*command)
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs" / "mine-sweep"
    assert f"run 1 of 2: {runs / 'beta-0.1'}" in done.stdout
    made = {
        run.name: {event.stage for event in RunDirectory(run).events() if isinstance(event, StageStarted)}
        for run in sorted(runs.iterdir())
    }
    first, second = made.values()
    assert "iteration-001/training" in first & second
    assert {"setup/world", "prompts/train", "iteration-001/generation", "iteration-001/pairs"} <= first - second
    shared = [runs / name / "iteration-001/generation" / MANIFEST for name in made]
    assert shared[0].samefile(shared[1])
    assert not list(runs.rglob("superseded/**/manifest.json"))
    again = pipeline(*command)
    assert again.stdout.count("nothing to do") == 2


@pytest.mark.slow
def test_a_mistake_ends_a_sweep_at_once(tmp_path: Path) -> None:
    done = pipeline("sweep", str(write_pretended(tmp_path)), "training.settings.betta=[0.1,0.3]", "--iters", "1")
    assert done.returncode == 2
    assert done.stderr.count("betta") == 1
    assert "run 1 of 2" not in done.stdout
