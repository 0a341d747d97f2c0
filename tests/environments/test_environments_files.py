"""The locks, the set-up script, and what imports without the stages' libraries."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contracts.callables import OWN_PACKAGES

FORBIDDEN = ("torch", "vllm", "transformers", "tokenizers", "datasets", "accelerate", "deepspeed", "trl", "numpy")


def lock(root: Path, name: str) -> dict[str, str]:
    """Versions by name."""
    lines = (root / "configs" / "environments" / f"{name}.txt").read_text().splitlines()
    requirements = [line for line in lines if not line.startswith("#")]
    for line in requirements:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), f"{name}: {line!r} is not name==version"
    return dict(line.split("==") for line in requirements)


def test_cpu_locks_have_none_of_the_cuda_packages(root: Path) -> None:
    for name in ("generation", "annotation", "training"):
        found = lock(root, f"{name}-cpu")
        assert not found.keys() & {"torchvision", "torchaudio", "torchcodec", "triton"}
        assert not [package for package in found if package.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_annotation_and_training_share_their_versions(root: Path, variant: str) -> None:
    assert lock(root, f"annotation-{variant}").items() <= lock(root, f"training-{variant}").items()


@pytest.mark.parametrize("name", ["generation", "annotation", "training"])
def test_variants_agree_on_what_decides_results(root: Path, name: str) -> None:
    cpu, gpu = lock(root, f"{name}-cpu"), lock(root, f"{name}-gpu")
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy", "msgspec", "pydantic"):
        assert cpu[package] == gpu[package], package


def test_the_driver_is_light(root: Path) -> None:
    driver = lock(root, "driver") | lock(root, "test")
    assert not driver.keys() & set(FORBIDDEN)


def test_contracts_driver_and_configs_import_without_the_stages_libraries(root: Path) -> None:
    program = f"""
import importlib, pkgutil, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ImportError(f"{{name}} must not be imported here")
sys.meta_path.insert(0, Refuse())
import contracts, pipelines
names = [module.name for package in (contracts, pipelines)
         for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".") if "__main__" not in module.name]
names += ["generation.config", "annotation.config", "training.config", "embedded.config"]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 100


def test_every_package_is_known(root: Path) -> None:
    assert sorted(OWN_PACKAGES) == sorted(path.parent.name for path in root.glob("*/py.typed"))


@pytest.fixture
def setup_script(root: Path, tmp_path: Path) -> Path:
    """scripts/setup.sh in a directory without anything else that it could use."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(root / "scripts" / "setup.sh", tmp_path / "scripts")
    (tmp_path / "configs").mkdir()
    shutil.copytree(root / "configs" / "environments", tmp_path / "configs" / "environments")
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path / "scripts" / "setup.sh"


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("#!/bin/sh\nexit 1\n", "no Python 3.11 or newer"),
        ('#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\n', "has no venv module"),
    ],
)
def test_set_up_says_what_is_missing(setup_script: Path, tmp_path: Path, python: str, words: str) -> None:
    program = tmp_path / "python"
    program.write_text(python)
    program.chmod(0o755)
    result = subprocess.run(
        ["bash", setup_script],
        env=os.environ | {"PYTHON": str(program)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert words in result.stderr
    assert "PYTHON=" in result.stderr
    assert not (tmp_path / ".venv").exists()
