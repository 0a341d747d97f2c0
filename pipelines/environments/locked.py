"""Locates, builds and lists the stages' locked environments.

An environment is identified by the content of its lock and the Python version, so that all checkouts and installations
with the same lock share it, and a changed lock makes a new one. It does not contain Ratchet: the code in use is added
by PYTHONPATH. A marker file, written last, says that it is complete; an incomplete one is built again.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from contracts.errors import UserError
from pipelines.environments.package_index import pip_settings, uv_options, uv_variables
from pipelines.environments.paths import configs, home, require_home
from pipelines.machine import gpu_count

STAGES = ("generation", "annotation", "training")
TRACKING = "tracking"
"""The environment of the trackers' processes: only for configs with trackers, and the same with and without GPUs."""
NAMES = (*STAGES, TRACKING)
VARIANT = "RATCHET_VARIANT"
MARK = "ratchet-complete"
POLL_SECONDS = 0.2
IMPORTS = {
    "generation": "import torch; from vllm import LLM",
    "annotation": "import torch, transformers",
    "training": "import torch, transformers, trl",
    TRACKING: "import wandb, trackio, tensorboard, mlflow",
}
"""Imports that must succeed in a CPU environment. GPU environments may be built on machines without a GPU."""
Variant = Literal["cpu", "gpu"]


class InstallError(Exception):
    """An installation failed: the command, and the last lines of its output."""

    exit_code = 1


@dataclass(frozen=True)
class Locked:
    """One locked environment of this version of Ratchet."""

    name: str
    variant: Variant

    @property
    def label(self) -> str:
        """The environment's name, with the variant if there are several."""
        return self.name if self.name == TRACKING else f"{self.name}-{self.variant}"

    @property
    def lock(self) -> Path:
        """The lock file, which lists its versions.

        Raises:
            UserError: it does not exist.
        """
        path = configs() / "environments" / f"{self.label}.txt"
        if not path.is_file():
            raise UserError(
                f"the lock {path} does not exist. Install Ratchet again, or name an interpreter of your own: "
                f"environments.{self.name}.python=/path/to/python."
            )
        return path

    @property
    def requirements(self) -> list[str]:
        """The lines `name==version` of the lock."""
        return [line for line in self.lock.read_text().split() if "==" in line]

    @property
    def directory(self) -> Path:
        """The environment's directory, which may not be built yet."""
        digest = hashlib.sha256("\n".join(self.requirements).encode()).hexdigest()
        python = f"py{sys.version_info.major}{sys.version_info.minor}"
        return home() / "environments" / f"{self.label}-{python}-{digest[:12]}"

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.directory / "bin" / "python"

    @property
    def complete(self) -> bool:
        """Whether it is built, and the Python that it is based on still exists."""
        return (self.directory / MARK).is_file() and self.python.exists()


def resolve_variant(variant: str = "auto") -> Variant:
    """cpu or gpu: the argument, else RATCHET_VARIANT, else gpu if GPUs are visible.

    Raises:
        UserError: it is something else.
    """
    asked = variant if variant != "auto" else os.environ.get(VARIANT) or "auto"
    if asked == "auto":
        asked = "gpu" if gpu_count() else "cpu"
    if asked not in get_args(Variant):
        raise UserError(f"variant {asked!r} does not exist. Set --variant or {VARIANT} to cpu, gpu or auto.")
    return cast(Variant, asked)


def require_known(name: str) -> str:
    """Return `name` if such an environment exists.

    Raises:
        UserError: it does not.
    """
    if name not in NAMES:
        raise UserError(f"environment {name!r} does not exist. Known: {', '.join(NAMES)}.")
    return name


def interpreter(name: str, variant: str = "auto") -> Path:
    """The interpreter of a locked environment.

    Raises:
        UserError: it has not been built.
    """
    locked = Locked(require_known(name), resolve_variant(variant))
    if not locked.complete:
        asked = "" if locked.variant == ("gpu" if gpu_count() else "cpu") else f" --variant {locked.variant}"
        raise UserError(
            f"the {locked.variant} environment of {name} is not built (it would be {locked.directory}). Build it: "
            f"pipeline env sync {name}{asked}. Or name your own: environments.{name}.python=/path/to/python."
        )
    return locked.python


def describe_all(variant: str) -> Iterator[str]:
    """One line per environment: those in use, and others that were built."""
    current = [Locked(name, resolve_variant(variant)) for name in NAMES]
    for locked in current:
        state = "ready" if locked.complete else "not built"
        yield f"{locked.name:<12} {locked.variant:<4} {state:<10} {locked.directory}"
    used = {locked.directory for locked in current}
    for directory in sorted((home() / "environments").glob("[!.]*")):
        if directory.is_dir() and directory not in used:
            yield f"{'(other)':<12} {'':<4} {'':<10} {directory}"


def sync(names: list[str], variant: str = "auto", say: Callable[[str], None] = print) -> list[Locked]:
    """Build the missing environments concurrently. Returns all of them.

    Raises:
        UserError: there is no environment of that name, or no such variant.
        InstallError: an installation failed.
    """
    chosen = resolve_variant(variant)
    wanted = [Locked(require_known(name), chosen) for name in dict.fromkeys(names)]
    missing = [locked for locked in wanted if not locked.complete]
    for locked in wanted:
        if locked not in missing:
            say(f"{locked.name}: up to date ({locked.variant}, {locked.directory})")
    if missing:
        require_home()
        pip = pip_settings()
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(len(missing)) as pool:
            try:
                jobs = [pool.submit(_build, locked, pip, say, stop) for locked in missing]
                while concurrent.futures.wait(jobs, POLL_SECONDS).not_done:
                    pass  # with a timeout: a signal just before an endless wait would be handled only after it
            except BaseException:  # an interrupt between two commands reaches neither of them
                stop.set()
                raise
        for job in jobs:
            job.result()
    return wanted


def _build(locked: Locked, pip: dict[str, str], say: Callable[[str], None], stop: threading.Event) -> None:
    with _lock(locked, say) as lock_fd:
        if locked.complete:
            say(f"{locked.name}: built meanwhile ({locked.variant}, {locked.directory})")
            return
        start = time.monotonic()
        if locked.directory.exists():
            shutil.rmtree(locked.directory)
        requirements = locked.requirements
        say(f"{locked.name}: installing {len(requirements)} packages ({locked.variant}) into {locked.directory}")
        environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        # Next to the environments, so that files are hard-linked: torch is unpacked once for all of them.
        environ.setdefault("UV_CACHE_DIR", str(home() / "uv"))
        environ |= uv_variables(pip, environ, locked.variant)
        run = functools.partial(_run, environ=environ, locked=locked, lock_fd=lock_fd, stop=stop)
        uv = _find_uv()
        run([uv, "venv", "--python", sys.executable, "--no-project", str(locked.directory)])
        # Compile now: otherwise the first stages would wait for it. Nothing writes into an environment later.
        install = [uv, "pip", "install", "--python", str(locked.python), "--no-deps", "--compile-bytecode"]
        run([*install, *uv_options(pip), "-r", str(locked.lock)])
        try:
            imports = IMPORTS[locked.name] if locked.variant == "cpu" or locked.name == TRACKING else "import torch"
            run([str(locked.python), "-c", imports])
        except InstallError as error:
            raise InstallError(f"{error}{_torch_advice(locked)}") from error
        (locked.directory / MARK).write_text("\n".join(requirements) + "\n")
        say(f"{locked.name}: ready in {time.monotonic() - start:.0f} s")


@contextlib.contextmanager
def _lock(locked: Locked, say: Callable[[str], None]) -> Iterator[int]:
    """Lock an environment while it is built. The lock ends with the last process that holds the descriptor."""
    path = locked.directory.with_name(f".{locked.directory.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"{locked.name}: another process is building {locked.directory}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _find_uv() -> str:
    bundled = Path(sys.executable).with_name("uv")
    uv = str(bundled) if bundled.exists() else shutil.which("uv")
    if uv is None:
        raise UserError("uv, which builds the environments, is not installed. Install it: pip install uv.")
    return uv


def _torch_advice(locked: Locked) -> str:
    if locked.variant == "gpu" or any(locked.directory.glob("lib/*/site-packages/torch-*+cpu.dist-info")):
        return ""
    return (
        "\nThe package index gave a torch that is not a CPU build. Add PyTorch's index of CPU builds (the page 'Get "
        "started' on pytorch.org names it) to pip's extra-index-url, or set UV_TORCH_BACKEND=cpu; then run this again."
    )


def _run(command: list[str], environ: dict[str, str], locked: Locked, lock_fd: int, stop: threading.Event) -> None:
    process = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # The child inherits the lock: if only this process is killed, no other process builds next to the child.
        pass_fds=[lock_fd],
    )
    output: bytes | None = None
    while output is None:
        if stop.is_set():
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=POLL_SECONDS)
    if process.returncode != 0:
        lines = output.decode(errors="replace").strip().splitlines()[-20:]
        tail = "\n".join(f"  {line}" for line in lines)
        raise InstallError(
            f"the {locked.variant} environment of {locked.name} was not built: exit code {process.returncode} of\n"
            f"  {shlex.join(command)}\n{tail}"
        )
