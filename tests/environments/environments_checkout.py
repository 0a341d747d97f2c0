"""Builds small stand-ins for torch and other packages, and a copy of the checkout whose locks name them.

The wheels are real and are installed by the real uv; only their content is tiny.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

STAND_INS = {
    # With SLOW_TORCH, the check of a new environment waits here, so that a test can kill it.
    "torch": "import os, time\ntime.sleep(float(os.environ.get('SLOW_TORCH', 0)))\n",
    "transformers": "",
    "trl": "",
    "vllm": "class LLM: ...\n",
}


def make_wheel(folder: Path, name: str, version: str, source: str) -> None:
    """Write a wheel with one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)


class Checkout:
    """A copy of the repository with locks of stand-ins, its own RATCHET_HOME, and pip settings that find the
    stand-ins."""

    def __init__(self, source: Path, path: Path, folder: Path) -> None:
        self.path = path
        self.home = folder / "home"
        self.wheels = folder / "wheels"
        for package in ("annotation", "contracts", "embedded", "generation", "pipelines", "reallocation", "training"):
            shutil.copytree(source / package, path / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(source / "pyproject.toml", path)
        for name, text in STAND_INS.items():
            make_wheel(self.wheels, name, "1.0+cpu" if name == "torch" else "1.0", text)
        for name in ("generation", "annotation", "training"):
            for variant in ("cpu", "gpu"):
                self.write_lock(f"{name}-{variant}", [f"{package}==1.0" for package in STAND_INS])
        self.write_lock("tracking", ["wandb==1.0"])

    def write_lock(self, name: str, lines: list[str]) -> None:
        """Write one of the locks."""
        lock = self.path / "configs" / "environments" / f"{name}.txt"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.write_text("# A comment.\n" + "\n".join(lines) + "\n")

    def variables(self, **more: str) -> dict[str, str]:
        """The environment variables of a command: pip is configured to find the wheels, uv is not configured."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_", "RATCHET_"))}
        own = {"RATCHET_HOME": str(self.home), "PYTHONPATH": str(self.path), "RATCHET_VARIANT": "cpu"}
        return kept | own | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)} | more

    def start(self, *arguments: str, **more: str) -> "subprocess.Popen[str]":
        """Start `pipeline env ...` with the code of this checkout."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", "env", *arguments],
            env=self.variables(**more),
            cwd=self.path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def env(self, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        """Run `pipeline env ...` to its end."""
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
