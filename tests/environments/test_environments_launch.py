"""How a stage is run in an environment of the user's. conda, apptainer, docker and podman are doubles that record
how they are called: the real programs cannot be had where the tests run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contracts.config import validate
from contracts.errors import UserError
from pipelines.environments.launch import EnvironmentConfig, launch_command, probe_versions
from pipelines.environments.paths import UNUSED_SECONDS, code_path, delete_unused

RECORDER = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
variables = {{name: os.environ.get(name) for name in ("PYTHONPATH", "DS_ACCELERATOR", "COLOUR")}}
Path(__file__ + ".json").write_text(json.dumps([sys.argv[1:], variables]))
"""


def environment(**keys: object) -> EnvironmentConfig:
    return validate(EnvironmentConfig, dict(keys), "test")


def run(config: EnvironmentConfig, argv: list[str]) -> str:
    command, variables = launch_command(config, "training", argv)
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_VARIANT", "cpu")
    monkeypatch.delenv("CONDA_EXE", raising=False)


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a recording program on PATH, alone of its kind; returns what it was called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def install(name: str):
        program = folder / name
        program.write_text(RECORDER)
        program.chmod(0o755)
        return lambda: json.loads((folder / f"{name}.json").read_text())

    return install


def test_interpreter_runs_the_code_in_use() -> None:
    program = "import contracts, sys; print(contracts.__file__); print(sys.argv[1:])"
    file, arguments = run(environment(python=sys.executable), ["-c", program, "a b", "'c'"]).splitlines()
    assert Path(file).is_relative_to(code_path())
    assert arguments == "['a b', \"'c'\"]"


def test_the_prologue_runs_first_in_bash(tmp_path: Path) -> None:
    """As `module load` does, it brings the interpreter onto PATH."""
    (tmp_path / "python-of-a-module").symlink_to(sys.executable)
    config = environment(
        python="python-of-a-module",
        prologue="COLOUR=red\nexport PATH=$MODULE:$PATH COLOUR",
        variables={"MODULE": str(tmp_path)},
    )
    assert run(config, ["-c", "import os; print(os.environ['COLOUR'])"]) == "red\n"


def test_a_failing_prologue_stops_the_stage() -> None:
    config = environment(python=sys.executable, prologue="false\ntrue")
    command, variables = launch_command(config, "training", ["-c", "print('ran')"])
    result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENIZERS_PARALLELISM", "DS_ACCELERATOR", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    _, variables = launch_command(environment(python=sys.executable), "training", [])
    assert variables["TOKENIZERS_PARALLELISM"] == "false"
    assert variables["DS_ACCELERATOR"] == "cpu"
    assert variables["PYTHONPATH"] == str(code_path())
    monkeypatch.setenv("PYTHONPATH", f"/mine{os.pathsep}{code_path()}")
    monkeypatch.setenv("RATCHET_VARIANT", "gpu")
    _, variables = launch_command(
        environment(python=sys.executable, variables={"TOKENIZERS_PARALLELISM": "true"}), "training", []
    )
    assert variables["TOKENIZERS_PARALLELISM"] == "true"
    assert variables["PYTHONPATH"] == str(code_path())
    assert variables["RATCHET_PYTHONPATH"] == f"{Path.cwd()}{os.pathsep}/mine" if Path.cwd() != code_path() else "/mine"
    assert "DS_ACCELERATOR" not in variables


def test_glibc_keeps_freed_memory_of_scoring_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the user has settings of their own, nor for training, whose peaks would be higher."""
    monkeypatch.setenv("RATCHET_VARIANT", "cpu")

    def settings(name: str) -> list[str]:
        _, variables = launch_command(environment(python=sys.executable), name, [])
        return [variable for variable in variables if variable.startswith("MALLOC_")]

    assert settings("annotation") == ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"]
    assert settings("training") == []
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert settings("annotation") == []


def test_a_secret_of_the_shell_is_not_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver writes the variables to the disk."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "secret" not in str(launch_command(environment(python=sys.executable), "training", []))


@pytest.mark.parametrize(("name", "flag"), [("ratchet", "-n"), ("/envs/ratchet", "-p")])
def test_conda(double, name: str, flag: str) -> None:
    recorded = double("conda")
    run(environment(conda=name, variables={"COLOUR": "red"}), ["-m", "training", "x=1 2"])
    argv, variables = recorded()
    assert argv == ["run", "--no-capture-output", flag, name, "python", "-m", "training", "x=1 2"]
    assert variables["COLOUR"] == "red"
    assert variables["PYTHONPATH"].startswith(str(code_path()))


@pytest.mark.parametrize("program", ["apptainer", "singularity"])
def test_apptainer(double, program: str) -> None:
    recorded = double(program)
    run(environment(container="image.sif", container_args=["--bind", "/data"]), ["-m", "training"])
    argv, variables = recorded()
    here, code = os.getcwd(), str(code_path())
    assert argv == [
        *("exec", "--bind", here, "--bind", code, "--pwd", here, "--bind", "/data"),
        *("image.sif", "python", "-m", "training"),
    ]
    assert variables["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize("program", ["docker", "podman"])
def test_docker(double, program: str) -> None:
    recorded = double(program)
    run(environment(container="image:1", python="python3", variables={"COLOUR": "red"}), ["-m", "training"])
    argv, variables = recorded()
    assert argv[:2] == ["run", "--rm"]
    assert "--interactive" in argv, "what is written to it would get lost"
    assert argv[-4:] == ["image:1", "python3", "-m", "training"]
    assert f"{os.getcwd()}:{os.getcwd()}" in argv
    assert f"{code_path()}:{code_path()}" in argv
    passed = {argv[index + 1] for index, word in enumerate(argv) if word == "-e"}
    assert {"COLOUR", "PYTHONPATH", "DS_ACCELERATOR", "RATCHET_ATTEMPT", "RATCHET_RUN"} <= passed
    assert variables["COLOUR"] == "red"


def test_gpus_are_given_to_containers(double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_VARIANT", "gpu")
    for program, option in (("apptainer", "--nv"), ("docker", "--gpus"), ("podman", "--device")):
        recorded = double(program)
        run(environment(container="image", container_runtime=program), [])
        assert option in recorded()[0]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"python": "/no/such/python"}, ["environments.training.python", "/no/such/python"]),
        ({"conda": "ratchet"}, ["conda", "PATH"]),
        ({"container": "image.sif"}, ["image.sif", "apptainer", "docker"]),
        ({"container": "image.sif", "container_runtime": "podman"}, ["podman"]),
    ],
)
def test_what_is_missing_is_named(double, keys: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        launch_command(environment(**keys), "training", [])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"conda": "a", "container": "b"},
        {"container_args": ["--nv"]},
        {"container_runtime": "docker"},
        {"pyton": "python3"},
        {"container": "a", "container_runtime": "dokcer"},
    ],
)
def test_contradictions_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(UserError):
        environment(**keys)


def test_versions_are_those_of_the_environment(tmp_path: Path) -> None:
    """An interpreter with a library more than this one."""
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", tmp_path], check=True)
    library = next(tmp_path.glob("lib/*/site-packages"))
    (library / "driver.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    information = library / "torch-9.8.7.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.8.7\n")
    assert probe_versions(environment(python=str(python)), "training")["torch"] == "9.8.7"
    with_prologue = environment(python=str(python), prologue="echo The module says hello.")
    assert probe_versions(with_prologue, "training")["torch"] == "9.8.7"


def test_versions_are_asked_once_per_process(tmp_path: Path) -> None:
    count = tmp_path / "count"
    config = environment(python=sys.executable, prologue=f"echo asked >> {count}")
    assert probe_versions(config, "generation") == probe_versions(config, "generation")
    assert count.read_text() == "asked\n"


def test_an_environment_that_cannot_run_ratchet(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    with pytest.raises(UserError, match=r"environments\.annotation cannot run Ratchet") as caught:
        probe_versions(environment(python=str(tmp_path / "bin" / "python")), "annotation")
    assert "No module named" in str(caught.value)
    assert "msgspec" in str(caught.value)


def test_copies_of_the_code_that_nobody_uses_any_more_go(tmp_path: Path) -> None:
    for name in ("old", ".left-by-a-kill", "used"):
        (tmp_path / name / "contracts").mkdir(parents=True)
        age = 1 if name == "used" else UNUSED_SECONDS + 60
        os.utime(tmp_path / name, (0, time.time() - age))
    delete_unused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
