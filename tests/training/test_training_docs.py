"""docs/algorithms.md is run: its files are written as they stand there, and trained with as a user would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_here, training_log
from test_training_policy import make_experience

from training.catalogue import BUILT_IN, describe

PAGE = ROOT / "docs" / "algorithms.md"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every Python file of the page, which begins with its name as a comment."""
    folder = tmp_path_factory.mktemp("own")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["dpo_positive.py", "gspo.py", "check.py"]
    for name, text in blocks:
        assert len(text.splitlines()) < 100
        (folder / name).write_text(text)
    return folder


def test_the_formula_is_that_of_the_paper(files: Path) -> None:
    result = subprocess.run(
        [sys.executable, "check.py"], cwd=files, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    assert float(result.stdout) > 0


def test_an_algorithm_on_pairs(files: Path, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    artifact = run_here(
        "policy", model=models["tied"], pairs=[pairs["pairs"]], reference=[pairs["reference"]], output=tmp_path / "out",
        algorithm=str(files / "dpo_positive.py"), settings={"lam": 1.0}, global_batch=11, learning_rate=1e-3, epochs=3,
    )  # fmt: skip
    log = training_log(artifact.path)
    assert log[-1]["loss"] < log[0]["loss"]
    assert {"penalty", "accuracy"} <= log[0].keys()
    assert list(artifact.manifest.key_parts["sources"]) == ["algorithm"]
    assert artifact.manifest.facts["settings"] == {"beta": 0.3, "lam": 1.0}


def test_an_algorithm_on_samples(files: Path, models: dict[str, Path], tmp_path: Path) -> None:
    description = describe(str(files / "gspo.py"))
    assert (description.reads, description.needs) == ("samples", ("reference",))
    assert description.functions.keys() >= {"advantages", "loss"}
    experience = make_experience(tmp_path / "experience", models["tied"])
    artifact = run_here(
        "policy", model=models["tied"], experience=experience, output=tmp_path / "out", global_batch=3, epochs=2,
        algorithm=str(files / "gspo.py"), learning_rate=1e-3,
    )  # fmt: skip
    log = training_log(artifact.path)
    assert log[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert log[-1]["ratio"] != log[0]["ratio"]


def test_the_tables_name_every_algorithm_with_its_settings() -> None:
    text = PAGE.read_text().partition("## One of your own")[0]
    assert set(re.findall(r"algorithms/(\w+)\.py\)", text)) == set(BUILT_IN)
    for name in BUILT_IN:
        (line,) = [line for line in text.splitlines() if line.startswith("|") and f"/{name}.py)" in line]
        *_, needs, settings, _ = [cell.strip() for cell in line.split("|")]
        description = describe(name)
        assert needs == ", ".join(description.needs)
        shown = dict(re.findall(r"(\w+)=([^,|]+)", settings))
        for setting, value in shown.items():
            default = description.defaults[setting]
            assert str(default).lower() == value or float(default) == float(value), (name, setting)  # type: ignore[arg-type]
