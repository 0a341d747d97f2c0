"""Answers for environments in forks of one process that has imported torch and transformers, which all of them have.

The imports take nearly all of the time of an answer. Other tests check that fresh processes of each environment answer.
"""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

from warm_stages import WarmStage

from contracts.forks import fork
from contracts.versions import source_version
from pipelines.environments.launch import EnvironmentConfig, ask, launch_command, stage_environment
from pipelines.environments.locked import interpreter
from pipelines.execution.warm import WarmProcesses

HERE = Path(__file__).parent
PACKAGE = "asked"
IMPORT_SECONDS = 200.0
_processes = WarmProcesses(Path(tempfile.mkdtemp(prefix="warm-asking-")))
"""They end with this process."""


@functools.cache
def socket_of_asked() -> Path:
    """The socket of the process that answers, which is started by the first call."""
    variables = stage_environment(launch_command(EnvironmentConfig(), "training", [])[1])
    variables.pop("PYTEST_CURRENT_TEST", None)
    variables["PYTHONPATH"] += f"{os.pathsep}{HERE}"
    return _processes.address(PACKAGE, str(interpreter("training", "cpu")), variables, str(HERE.parents[1]))


@functools.cache
def interpreters() -> set[str]:
    """Those of the locked environments."""
    return {str(interpreter(name, "cpu")) for name in ("annotation", "generation", "training")}


def ask_warm(environment: EnvironmentConfig, name: str, argv: list[str], what: str, **options: Any) -> bytes:
    """`ask`, in a fork if the answer needs the libraries of a locked environment."""
    command, variables = launch_command(environment, name, argv)
    needs_libraries = argv == ["-m", "contracts.preflight"] or "import json, torch" in argv[-1]
    if command[0] not in interpreters() or not needs_libraries:
        return ask(environment, name, argv, what, **options)
    with tempfile.NamedTemporaryFile() as request, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        request.write(options.get("request", b""))
        request.flush()
        command[1:] = ["-m", PACKAGE, request.name, *argv]
        place = (stage_environment(variables), os.getcwd(), source_version(PACKAGE), out, IMPORT_SECONDS)
        process = fork(socket_of_asked(), command, *place, errors=err)
        assert process is not None, f"{name} cannot be asked in a fork"
        stage = WarmStage(process, out, err)
        said, errors = stage.communicate()
        assert stage.returncode == 0, errors
        return said.strip().splitlines()[-1].encode()
