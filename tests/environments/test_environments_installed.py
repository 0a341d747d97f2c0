"""The built wheel, installed into an environment of its own outside of the checkout, and used from anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from contracts.artifacts import Artifact
from contracts.callables import OWN_PACKAGES
from contracts.manifest import MANIFEST
from pipelines.environments.package_index import pip_settings, uv_variables
from pipelines.environments.paths import home

pytestmark = pytest.mark.slow

FOLDERS = (*OWN_PACKAGES, "configs", "quickstart")
FILES = ("struct", "queue", "random", "typing", "torch", "yaml", "submitit")
RULE = """
import importlib.util
import helper

if importlib.util.find_spec("uv"):
    raise SystemExit("a library of the driver's is in sight")


def variety(*, messages, response, finish_reason, answer):
    return helper.distinct(response) + len(response) / 100
"""
HELPER = "def distinct(text):\n    return len(set(text.split()))\n"
ALGORITHM = '''
"""DPO, as the user's own."""

from training.algorithms.dpo import loss

READS = "pairs"
NEEDS = ("reference",)
LIMITS = {"beta": "> 0", "label_smoothing": ">= 0, < 0.5"}
__all__ = ["loss"]
'''
SMALL = (
    "world={demonstrations: 1, train: 8, preference: 1, heldout: 6}", "prompts.per_iteration=8", "sft=null",
    "reward_model=null", "generation.engine=transformers", "generation.max_new_tokens=8", "evaluation.k=2",
)  # fmt: skip
OWN = (
    "scorers={reward: {kind: rule, function: 'logging.py:variety'}, "
    "gold: {kind: rule, function: 'embedded.reviews:gold_score'}}",
    "training.algorithm=types.py",
)
"""A scorer and an algorithm of the user's own, and a scorer of the toy task, whose package has an impostor."""


@dataclass
class Installed:
    """An environment with the wheel in it."""

    wheel: Path
    pipeline: Path


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """What `pip install` of the built wheel makes."""
    folder = tmp_path_factory.mktemp("installed")
    variables = {**os.environ, **uv_variables(pip_settings(), os.environ, "cpu"), "UV_CACHE_DIR": str(home() / "uv")}
    python, lock = folder / "environment/bin/python", root / "configs/environments/driver.txt"
    for command in (
        ["build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, root],
        ["venv", "--python", sys.executable, python.parents[1]],
        ["pip", "install", "--python", python, "--constraint", lock, "ratchet-rlhf", "--find-links", folder],
    ):
        subprocess.run([sys.executable, "-m", "uv", "-q", *command], env=variables, cwd=folder, check=True)
    (wheel,) = folder.glob("*.whl")
    return Installed(wheel, python.with_name("pipeline"))


def begin(command: list[object], folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start a command in a folder, by a shell that knows nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.Popen(
        [*map(str, command), *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(process: "subprocess.Popen[str]") -> str:
    """What it has printed when it has ended well."""
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    return out


def published(folder: Path) -> dict[str, tuple[str, str]]:
    """Digest and key of everything that the quickstart below a folder has published."""
    run = folder / "runs/quickstart"
    manifests = {path.parent: Artifact.open(path.parent).manifest for path in run.rglob(MANIFEST)}
    return {path.relative_to(run).as_posix(): (it.digest, it.key) for path, it in manifests.items()}


def write_own_code(folder: Path) -> None:
    """A scorer and an algorithm of the user's own, in files that are called like modules of Python's."""
    folder.mkdir()
    for name, text in {"logging": RULE, "helper": HELPER, "types": ALGORITHM}.items():
        (folder / f"{name}.py").write_text(text)


def write_impostors(folder: Path) -> None:
    """Files and folders that are called like libraries and like Ratchet's packages."""
    for name in FOLDERS:
        (folder / name).mkdir()
    for path in [*(Path(name, "__init__.py") for name in FOLDERS), *(Path(f"{name}.py") for name in FILES)]:
        (folder / path).write_text(f"raise SystemExit('{path} of the working directory')\n")


def test_the_wheel_holds_every_package_recipe_and_lock(installed: Installed, root: Path) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    code = {path.relative_to(root).as_posix() for package in OWN_PACKAGES for path in (root / package).rglob("*.py")}
    files = [path for path in (root / "configs").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    configs = {f"pipelines/configs/{path.relative_to(root / 'configs').as_posix()}" for path in files}
    assert {f"{package}/py.typed" for package in OWN_PACKAGES} | code | configs <= names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(OWN_PACKAGES)


def test_the_quickstart_runs_from_anywhere(installed: Installed, tmp_path: Path) -> None:
    """From a hostile directory with code of the user's own: the same as from the checkout."""
    hostile, plain = (tmp_path / name for name in ("hostile", "plain"))
    write_own_code(plain)
    write_own_code(hostile)
    write_impostors(hostile)
    checkout = shutil.which("pipeline", path=str(Path(sys.executable).parent))
    processes = [
        begin([installed.pipeline, "run", "quickstart"], hostile, *SMALL, *OWN, "--iters", "1"),
        begin([checkout, "run", "quickstart"], plain, *SMALL, *OWN, "--iters", "1"),
    ]
    for process in processes:
        end(process)
    found, expected = published(hostile), published(plain)
    assert found == expected
    assert {"iteration-001/training", "iteration-001/evaluation", "prompts/train"} <= found.keys()
    assert "uPlot" in (hostile / "runs/quickstart/report.html").read_text()
    # The same recipe, and nothing to do, for whichever installation goes on with the run.
    assert "nothing to do" in end(begin([checkout, "run", "quickstart"], hostile, *SMALL, *OWN, "--iters", "1"))


def test_a_stage_has_a_copy_of_its_code_and_nothing_of_the_drivers(installed: Installed, tmp_path: Path) -> None:
    program = "import importlib.util, sys, training; print(training.__file__, *sys.path, sep='\\n')"
    program += "; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    names = ("generation", "modeling", "pipelines", "submitit", "uv")
    process = begin([installed.pipeline, "env", "run", "annotation", "-c", program, *names], tmp_path)
    code, *paths, seen = end(process).splitlines()
    assert seen == "['generation', 'modeling']"
    folder = Path(code).parents[1]
    assert folder.parent == home() / "code"
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    assert paths[0] == str(folder)
    assert not [path for path in paths if path.startswith(str(installed.pipeline.parents[1]))]


def test_recipes_are_listed_and_an_unknown_one_gets_the_nearest(installed: Installed, tmp_path: Path) -> None:
    listed = end(begin([installed.pipeline, "recipes"], tmp_path))
    assert [line.split()[0] for line in listed.splitlines()][:3] == ["quickstart", "quickstart-ppo", "smollm2"]
    text = end(begin([installed.pipeline, "recipes", "smollm2"], tmp_path))
    (tmp_path / "mine.yaml").write_text(text.replace("policy: models/smollm2", "policy: models"))
    (tmp_path / "models").mkdir()
    for command in ("smollm2", "mine.yaml"):  # the data beside the recipe are found; its model is not there yet
        process = begin([installed.pipeline, "run", command, "--dry-run"], tmp_path)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2
        assert "topics" not in err
        assert "models" in err
    process = begin([installed.pipeline, "run", "quikstart"], tmp_path)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "Did you mean 'quickstart'" in err
    assert "llama3-8b-ppo" in err
