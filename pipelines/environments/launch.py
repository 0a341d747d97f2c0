"""Builds the command that runs Python in a locked environment, or in a user's interpreter, conda or container."""

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NoReturn, Self

from pydantic import model_validator

from contracts.config import PathText, Section, runtime
from contracts.entrypoint import USER_PATH, inherited_variables, is_launcher_variable, python_variables
from contracts.errors import TransientError, UserError
from pipelines.environments.locked import VARIANT, Locked, interpreter, require_known, resolve_variant
from pipelines.environments.paths import code_path, configs, source_root

CONTAINER_RUNTIMES = ("apptainer", "singularity", "docker", "podman")
PASSED_ON = (
    "RATCHET_ATTEMPT",
    "RATCHET_RUN",
    "RATCHET_ROLE",
    "RATCHET_GRACE_SECONDS",
    USER_PATH,
    "RANK",
    "WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_TOKEN",
    "HF_ENDPOINT",
)
"""Variables that docker and podman pass on if they are set."""


OWN = "own."
"""Prefix of the keys of the user's own environments."""

MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""Settings with which glibc keeps the memory of large temporaries, instead of returning it and having it zeroed again
for every batch. Only for scoring, whose temporaries have similar sizes; in training, holes between them would raise
the peak."""


class EnvironmentConfig(Section):
    """The environment of a kind of stage; empty: its locked one."""

    python: PathText | None = runtime(None, min_length=1)
    """Path of your own interpreter, or its name on PATH, which the prologue may set; in a container or conda
    environment the name of its interpreter."""
    conda: PathText | None = runtime(None, min_length=1)
    """Name or prefix (a path) of a conda environment."""
    container: PathText | None = runtime(None, min_length=1)
    """Container image: a .sif file or docker://IMAGE for apptainer, an image name for docker or podman."""
    container_runtime: Literal["apptainer", "singularity", "docker", "podman"] | None = runtime(None)
    """Container runtime; by default the first of these that is on PATH."""
    container_args: list[str] = runtime([])
    """Further options for the container runtime, for example [--bind, /data] or [-v, "/data:/data"]."""
    prologue: str = runtime("")
    """Lines of bash to run before the stage, for example `module load cuda`."""
    variables: dict[str, str] = runtime({})
    """Environment variables to set for the stage. PYTHONPATH: folders with your own modules, after the libraries."""

    @property
    def is_locked(self) -> bool:
        """Whether it is the locked environment, without a prologue."""
        return not (self.python or self.conda or self.container or self.prologue)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in self.variables.items():
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no valid variable name: use letters, digits and _, and no digit first.")
            if "\0" in value:
                raise ValueError(f"the value of {name} holds a zero byte, which no variable can.")
            if is_launcher_variable(name):
                raise ValueError(f"{name} sets the rank of a process, which Ratchet does itself. Remove it.")
        if self.conda and self.container:
            raise ValueError("conda and container exclude each other: name one of them.")
        if not self.container and (self.container_runtime or self.container_args):
            raise ValueError("container_runtime and container_args need container=IMAGE.")
        return self


def launch_command(environment: EnvironmentConfig, name: str, argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command that runs `python ARGV` in an environment.

    Args:
        name: generation, annotation or training, whose locked environment is used if `environment` specifies no other;
            or own.NAME, which always specifies one.
        argv: arguments after `python`.

    Returns:
        The command, and the variables to set for it on top of this process's.

    Raises:
        UserError: the environment, or a program that it needs, does not exist.
    """
    variables = _variables(environment, name)
    if environment.container:
        command = _container(environment, variables)
    elif environment.conda:
        command = _conda(environment.conda)
    elif environment.python:
        command = [_own_python(environment, name)]
    else:
        python = interpreter(name)
        # For programs of the environment that its libraries call, such as ninja.
        variables.setdefault("PATH", f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
        variables.setdefault("VIRTUAL_ENV", str(python.parent.parent))  # instead of the driver's
        command = [str(python)]
    if environment.container or environment.conda:
        command.append(environment.python or "python")
    command += argv
    if environment.prologue:
        command = ["bash", "-c", f'set -e\n{environment.prologue}\nexec "$@"', "bash", *command]
    return command, variables


def _variables(environment: EnvironmentConfig, name: str) -> dict[str, str]:
    """Environment variables of a stage: defaults, overridden by the user's environment; PYTHONPATH; the config's."""
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if resolve_variant() == "cpu":
        defaults["DS_ACCELERATOR"] = "cpu"
        if name == "annotation" and not any(variable.startswith(("MALLOC_", "GLIBC_")) for variable in os.environ):
            defaults |= MALLOC_SETTINGS
    variables = {name: os.environ.get(name, value) for name, value in defaults.items()}
    configured = dict(environment.variables)
    user_paths = [os.getcwd()]  # in a prepared driver, USER_PATH has its original PYTHONPATH
    for paths in (os.environ.get(USER_PATH, ""), os.environ.get("PYTHONPATH", ""), configured.pop("PYTHONPATH", "")):
        user_paths += [os.path.abspath(path) for path in paths.split(os.pathsep) if path]
    code = str(code_path())
    user_paths = [path for path in dict.fromkeys(user_paths) if path not in (code, str(source_root()))]
    return variables | python_variables(code, user_paths) | configured


def stage_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a stage's process: this process's without its interpreter's variables, plus `variables`."""
    return {**inherited_variables(os.environ), **variables}


def _own_python(environment: EnvironmentConfig, name: str) -> str:
    python = environment.python or ""
    if os.sep in python:  # links are kept: a virtual environment's interpreter is one
        python = os.path.abspath(python)
    if not environment.prologue and shutil.which(python) is None:
        raise UserError(
            f"environments.{name}.python is {python!r}, which is not an executable file. Give the path of a Python "
            "interpreter, or remove the key to use the locked environment."
        )
    return python


def _conda(conda: str) -> list[str]:
    program = os.environ.get("CONDA_EXE") or shutil.which("conda")
    if program is None:
        raise UserError(f"conda environment {conda!r}: no program conda on PATH, and CONDA_EXE is not set.")
    return [program, "run", "--no-capture-output", "-p" if "/" in conda else "-n", conda]


def _container(environment: EnvironmentConfig, variables: dict[str, str]) -> list[str]:
    image = environment.container or ""
    candidates = [environment.container_runtime] if environment.container_runtime else list(CONTAINER_RUNTIMES)
    program = next((name for name in candidates if shutil.which(name)), None)
    if program is None:
        raise UserError(f"container {image!r}: found none of {', '.join(candidates)} on PATH. Install one.")
    here, code, gpu = os.getcwd(), str(code_path()), resolve_variant() == "gpu"
    if program in ("apptainer", "singularity"):  # these pass on all variables
        command = [program, "exec", *(["--nv"] if gpu else []), "--bind", here, "--bind", code, "--pwd", here]
        return [*command, *environment.container_args, image]
    command = [program, "run", "--rm", "--init", "--interactive", "--ipc=host", "--network=host"]
    command += _gpu_options(program, gpu)
    # As this user, who then owns what is published (podman maps the user on its own).
    command += ["--user", f"{os.getuid()}:{os.getgid()}"] if program == "docker" else ["--userns=keep-id"]
    command += ["-v", f"{here}:{here}", "-v", f"{code}:{code}", "-w", here]
    for name in [*variables, *PASSED_ON]:  # by name: the program takes the values from its own environment
        command += ["-e", name]
    return [*command, *environment.container_args, image]


def _gpu_options(program: str, gpu: bool) -> list[str]:
    if not gpu:
        return []
    return ["--gpus", "all"] if program == "docker" else ["--device", "nvidia.com/gpu=all"]


def probe_versions(environment: EnvironmentConfig, name: str) -> dict[str, str]:
    """Versions of an environment's libraries, as they enter stage keys; cached per process.

    Raises:
        UserError: the environment cannot run Ratchet's code.
    """
    return dict(_probe(environment.model_dump_json(), name))


@functools.cache
def _probe(environment_json: str, name: str) -> dict[str, str]:
    program = (
        f"import gc; gc.disable(); import json, {_package(name)}.config, contracts.stage, contracts.versions; "
        "print(json.dumps(contracts.versions.installed_versions())); gc.freeze()"
    )
    needs = (
        "It needs Python >= 3.11, msgspec, packaging, pydantic and ruamel.yaml in addition to the stage's libraries; "
        f"see {requirements(name)}."
    )
    environment = EnvironmentConfig.model_validate_json(environment_json)
    found: dict[str, str] = json.loads(ask(environment, name, ["-c", program], "run Ratchet", fix=needs))
    return found


def ask(
    environment: EnvironmentConfig, name: str, argv: list[str], what: str, *, request: bytes = b"", fix: str = ""
) -> bytes:
    """Run `python ARGV` in an environment and return the last line that it prints.

    Args:
        what: the purpose, for the error message.
        request: its standard input.
        fix: appended to the error message.

    Raises:
        UserError: it fails.
        TransientError: a signal ended it.
    """
    command, variables = launch_command(environment, name, argv)
    result = subprocess.run(command, env=stage_environment(variables), input=request, capture_output=True, check=False)
    if result.returncode < 0:
        raise TransientError(f"asking environments.{name} to {what} was ended by signal {-result.returncode}")
    if result.returncode != 0:
        output = (result.stderr.strip() or result.stdout.strip() or b"no output").decode(errors="replace")
        lines = [f"    {line}" for line in output.splitlines()[-5:]] + ([f"  {fix}"] if fix else [])
        text = f"environments.{name} cannot {what} (exit code {result.returncode}):"
        raise UserError("\n".join([text, *lines]))
    return result.stdout.strip().splitlines()[-1]


def requirements(name: str) -> Path:
    """The requirements file of a stage's environment, for users who build their own."""
    return configs() / "environments" / f"{Locked(_package(name), resolve_variant()).label}.in"


def _package(name: str) -> str:
    """The package whose stages run in an environment; annotation for the user's own environments."""
    return "annotation" if name.startswith(OWN) else name


def exec_python(name: str, variant: str, arguments: list[str]) -> NoReturn:
    """Replace this process by `python ARGUMENTS` in a locked environment, with Ratchet's code."""
    os.environ[VARIANT] = resolve_variant(variant)
    command, variables = launch_command(EnvironmentConfig(), require_known(name), arguments)
    os.execve(command[0], command, stage_environment(variables))
