"""Hostile surroundings: the same result, or one message that names the thing; never a traceback, never silence."""

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipelines_smallest import COMMAND

from contracts.entrypoint import inherited_variables
from pipelines.config.load import load_run_config
from pipelines.environments.launch import EnvironmentConfig, launch_command, stage_environment
from pipelines.execution.endings import ending_of, progress_of
from pipelines.execution.supervisor import supervise_locally
from pipelines.insight.event_text import notable_lines
from pipelines.main import main
from pipelines.run.directory import RunDirectory
from pipelines.run.events import StageFailed

ROOT = Path(__file__).parents[2]
IMPOSTORS = ("torch", "yaml", "msgspec", "pydantic", "queue", "random", "rich")
STAGE = [sys.executable, "-m", "contracts", "prompts", "source=prompts.jsonl", "output=out"]
HELP = [*COMMAND, "run", "--help"]
FROM_LAUNCHER = "no launcher has started it"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prompts, and with files and folders that are named like libraries and like ours."""
    folder = tmp_path / "Größe 1"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"prompt": "wie groß → ?"}\n', encoding="utf-8")
    impostors(folder)
    monkeypatch.chdir(folder)
    return folder


def impostors(folder: Path) -> None:
    for name in IMPOSTORS:
        (folder / f"{name}.py").write_text(f"raise SystemExit('the {name} of the working directory')")
    for name in ("training", "generation"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise SystemExit('the {name} of the working directory')")


def run(command: list[str], **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", [STAGE, HELP], ids=["stage", "driver"])
@pytest.mark.parametrize(
    "variables",
    [
        {
            "PYTHONPATH": f".{os.pathsep}{ROOT}", "PYTHONOPTIMIZE": "2",
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
        },
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONOPTIMIZE": "1"},
        {
            "PYTHONIOENCODING": "ascii", "PMI_RANK": "3", "PMI_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4",
            "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "TMPDIR": "/nowhere", "VIRTUAL_ENV": "/nowhere",
        },
    ],
    ids=["path and ranks", "locale", "encoding and launchers"],
)  # fmt: skip
def test_surroundings_that_do_not_matter(command: list[str], variables: dict[str, str], place: Path) -> None:
    result = run(command, **variables)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    if command is STAGE:
        assert "wie groß → ?" in (place / "out" / "shard-00000.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4"}, FROM_LAUNCHER),
        ({"WORLD_SIZE": "2"}, FROM_LAUNCHER),
        ({"RANK": "one"}, FROM_LAUNCHER),
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, FROM_LAUNCHER),
        ({"RANK": "4", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, "RANK must be from 0 to WORLD_SIZE - 1"),
    ],
)
def test_a_rank_that_nobody_waits_for(variables: dict[str, str], message: str, place: Path) -> None:
    result = run(STAGE, **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (place / "out").exists()


@pytest.mark.parametrize("command", [STAGE, HELP], ids=["stage", "driver"])
def test_a_working_directory_that_is_gone(command: list[str], place: Path) -> None:
    gone = place / "gone"
    gone.mkdir()
    script = f'cd "{gone}" && rmdir "{gone}" && exec "$@"'
    result = run(["bash", "-c", script, "bash", *command])
    assert result.returncode == 2
    assert result.stderr.startswith("error: the working directory does not exist any more")


@pytest.mark.parametrize(("limit", "named"), [("-f 0", "ulimit -f"), ("-v 30000", "ulimit -v")])
def test_small_limits_are_named(limit: str, named: str, place: Path) -> None:
    result = run(["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *STAGE])
    assert result.returncode == 2, result.stderr
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_a_script_finds_ours_first(place: Path) -> None:
    (place / "contracts").mkdir()
    (place / "contracts" / "__init__.py").write_text("raise SystemExit('theirs')")
    command = ["bash", str(ROOT / "scripts" / "import-prompts.sh"), *STAGE[4:]]
    result = run(command, PYTHON=sys.executable, PYTHONPATH=str(place))
    assert result.returncode == 0, result.stderr


def test_the_drivers_stages_have_clean_surroundings(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has been exported where the driver, or a job of its, was started."""
    hostile = {
        "RANK": "3", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_USE_FSDP": "true", "SLURM_PROCID": "3",
        "PMI_SIZE": "4", "PYTHONHOME": "/nowhere", "PYTHONOPTIMIZE": "2", "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error", "PYTHONPATH": str(place), "TMPDIR": "/nowhere",
    }  # fmt: skip
    environment = EnvironmentConfig(python=sys.executable, variables={"PYTHONPATH": str(place / "mine"), "MINE": "1"})
    argv, variables = launch_command(environment, "annotation", STAGE[1:])
    attempt = place / "attempt-1"
    attempt.mkdir()
    request = {"argv": argv, "environment": variables, "unset": [], "directory": str(place), "run": "", "driver": None}
    (attempt / "request.json").write_text(json.dumps(request))
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)
    assert supervise_locally(str(attempt)) == 0, (attempt / "stage.log").read_text()
    given = stage_environment(variables)
    assert not set(hostile) - {"PYTHONPATH"} & set(given)
    assert (given["PYTHONPATH"], given["MINE"]) == (str(ROOT), "1")
    assert given["RATCHET_PYTHONPATH"].split(os.pathsep)[-1] == str(place / "mine")
    assert inherited_variables({"SLURM_JOB_ID": "7", "HOME": "/"}) == {"SLURM_JOB_ID": "7", "HOME": "/"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("variables={A-B: x}", "'A-B' is no valid variable name"),
        ("variables={RANK: '0'}", "RANK sets the rank of a process"),
        ("python=no/such/python", "not an executable file"),
    ],
)
def test_environments_that_cannot_be(
    setting: str, message: str, smallest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(smallest), f"environments.training.{setting}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run", "smallest.yaml"], ["env", "sync"]])
@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null/below"])
def test_a_home_that_cannot_be_written_to(
    arguments: list[str], home: str, smallest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(smallest.parent)
    monkeypatch.delenv("RATCHET_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert f"error: {home}/.cache/ratchet cannot be written to" in message
    assert "RATCHET_HOME=PATH" in message
    assert not (smallest.parent / "runs").exists()


def test_a_relative_interpreter_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    environment = EnvironmentConfig(python="bin/python", prologue="cd /")
    command, _ = launch_command(environment, "training", ["-c", "print(6 * 7)"])
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "42\n"


@pytest.mark.parametrize("program", ["contracts", "pipelines"])
@pytest.mark.parametrize(
    ("number", "delay"), [(signal.SIGINT, 0.0), (signal.SIGINT, 0.2), (signal.SIGTERM, 0.1), (signal.SIGHUP, 0.1)]
)
def test_a_signal_while_it_starts(program: str, number: signal.Signals, delay: float, place: Path) -> None:
    """From our first line on; before it, Python itself has not heard of us. A named pipe tells that it is there."""
    os.mkfifo(place / "begun")
    lines = ["import os, runpy, sys", "sys.argv = ['', 'prompts', 'source=prompts.jsonl', 'output=out']"]
    if program == "pipelines":
        lines[1] = "sys.argv = ['', 'run', '--help']"
    lines += [
        "from contracts import entrypoint",
        "prepare = entrypoint.prepare",
        "def begin(**options):",
        "    prepare(**options)",
        "    os.close(os.open('begun', os.O_WRONLY))",
        "entrypoint.prepare = begin",
        f"runpy.run_module('{program}', run_name='__main__', alter_sys=False)",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    (place / "begun").read_bytes()
    time.sleep(delay)
    process.send_signal(number)
    _, said = process.communicate(timeout=200)
    assert "Traceback" not in said
    assert process.returncode in ((128 + number, 0) if number == signal.SIGINT else (128 + number, -number, 0)), said


def test_child_processes_inherit_streams_where_some_are_closed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from contracts.entrypoint import open_closed_streams; open_closed_streams(); "
        "open(sys.argv[1], 'w').write(str([os.get_inheritable(number) for number in range(3)]))"
    )
    result = run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code, str(tmp_path / "said")])
    assert result.returncode == 0
    assert (tmp_path / "said").read_text() == "[True, True, True]"


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed: str, place: Path) -> None:
    """A file that is opened does not get the number of a stream, and with it what is printed."""
    for command, code in (([*COMMAND, "recipes"], 0), ([*COMMAND, "nosuch"], 2), (STAGE, 0)):
        result = run(["bash", "-c", f'"$@" {closed}', "bash", *command])
        assert "Traceback" not in result.stderr
        assert result.returncode == code
    assert (place / "out/manifest.json").is_file()


@pytest.mark.slow
def test_a_terminal_that_is_closed(smallest: Path) -> None:
    """The run ends as by Ctrl-C, and what it could not print is no failure of its display."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *COMMAND, "run", str(smallest), "--iters", "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=smallest.parent, stdin=terminal, stdout=terminal,
        stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    begun = b""
    while b"setup/world" not in begun:
        begun += os.read(controller, 4096)
    os.close(controller)  # the kernel sends SIGHUP to the terminal's session
    assert process.wait(300) == 130
    assert "listener failed" not in (smallest.parent / "runs/smallest/events.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["env", "list"], ["run", "--help"], ["doctor", "smallest.yaml"]])
def test_output_that_nobody_reads(arguments: list[str], smallest: Path) -> None:
    command = 'exec 3>&1; { "$@"; echo "code $?" >&3; } | true'
    result = subprocess.run(
        ["bash", "-c", command, "bash", *COMMAND, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=smallest.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    waits = r"checking models and data in the environments of .* \.\.\.\n"  # said where it takes longer than a moment
    assert re.fullmatch(f"({waits})?", result.stderr)
    assert result.stdout.strip() in ("code 141", "code 0")


DAMAGE = {
    "empty": b"",
    "torn": b'{"kind": "user", "te',
    "foreign": b'{"name": "Ada"}',
    "a list": b"[1, 2]",
    "null": b"null",
    "binary": b"\xff\x00\xfe",
}
WRITTEN = "exit.json progress.json failure-1.json jobs.json decision.json request.json cancel stage.log".split()


@pytest.fixture
def begun(smallest: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run with one attempt at a stage, that failed by a transient failure."""
    monkeypatch.chdir(smallest.parent)
    config = load_run_config(smallest, [])
    run = RunDirectory(config.run_directory)
    run.claim(config, smallest, 1)
    attempt = run.new_attempt("iteration-001/generation")
    (attempt / "exit.json").write_text('{"code": 1, "started": 0, "ended": 1}')
    (attempt / "stage.log").write_text("said\n")
    assert run._lock is not None
    run._lock.close()
    return run


@pytest.mark.parametrize("name", WRITTEN)
def test_a_damaged_file_of_an_attempt(name: str, begun: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever lies in the place of what a stage or the driver has left: it is passed over, and the run goes on."""
    (attempt,) = begun.attempts("iteration-001/generation")
    path = attempt / name
    for damage in [*DAMAGE.values(), None]:
        path.unlink(missing_ok=True)
        if damage is None:
            path.mkdir()
        else:
            path.write_bytes(damage)
        assert ending_of(attempt).kind in ("error", "transient")
        assert progress_of(attempt) is None
        for command in ("status", "logs"):
            assert main([command, str(begun.path)]) in (0, 2)
            assert "Traceback" not in capsys.readouterr().err
    assert begun.new_attempt("iteration-001/generation").name == "attempt-2"


def test_foreign_things_among_the_attempts(begun: RunDirectory) -> None:
    """Attempts are numbered on after those that were deleted, and other people's folders do not count."""
    stage = begun.path / "logs" / "iteration-001" / "generation"
    (stage / "attempt-1").rename(stage / "attempt-7")
    (stage / "attempt-7" / "notes").mkdir()
    (stage / "attempt-old").mkdir()
    (stage / "attempt-9").touch()
    assert [path.name for path in begun.attempts("iteration-001/generation")] == ["attempt-7"]
    assert ending_of(stage / "attempt-7").how == "failed with exit code 1."
    assert begun.new_attempt("iteration-001/generation").name == "attempt-10"


def test_lines_of_the_events_that_are_not_ours(begun: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    failure = {"attempt": "attempt-1", "kind": "error", "how": "fell over.", "retry_in": None}
    begun.record(StageFailed(stage="iteration-001/generation", **failure))
    with (begun.path / "events.jsonl").open("ab") as file:
        for line in DAMAGE.values():
            file.write(line + b"\n")
        file.write(b'{"event": "failed", "time": "yesterday"}\n{"event": "cancelled", "jobs": 3}\n{"event": "torn')
    begun.record(StageFailed(stage="iteration-001/training", **failure))
    told = notable_lines(begun.events())
    assert [line[21:] for line in told[:2]] == [
        "iteration-001/generation: attempt-1 fell over. Not retried.",
        "iteration-001/training: attempt-1 fell over. Not retried.",
    ]
    assert told[2:] == ["7 lines of events.jsonl cannot be read and left out here; the results are unaffected."]
    assert main(["status", str(begun.path)]) == 0
    assert "fell over" in capsys.readouterr().out


def test_logs_that_are_deleted_while_a_stage_runs(place: Path) -> None:
    """It works on and publishes; its end is noted where its logs were."""
    attempt = place / "logs" / "attempt-1"
    attempt.mkdir(parents=True)
    script = "rm -r logs; sleep 0.5; exit 3"
    request = {"argv": ["bash", "-c", script], "environment": {}, "unset": [], "directory": str(place)}
    (attempt / "request.json").write_text(json.dumps({**request, "run": "", "driver": None}))
    assert supervise_locally(str(attempt)) == 3
    assert ending_of(attempt).how == "failed with exit code 3."


@pytest.mark.parametrize(
    ("argv", "directory", "message"),
    [
        (["/no/such/python"], ".", "/no/such/python cannot be started"),
        (["true"], "gone", "gone does not exist any more"),
        (["bash", "-c", "kill -XFSZ $$"], ".", "ulimit -f"),
    ],
)
def test_a_stage_that_cannot_start(argv: list[str], directory: str, message: str, place: Path) -> None:
    request = {"argv": argv, "environment": {}, "unset": [], "directory": str(place / directory), "run": ""}
    (place / "request.json").write_text(json.dumps({**request, "driver": None}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, limits[1]))
    try:
        supervise_locally(str(place))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ending = ending_of(place)
    assert ending.kind == "user"
    assert message in str(ending.reason)


def test_an_interrupt_while_a_run_is_watched(begun: RunDirectory) -> None:
    """`attach` leaves the run alone and goes quietly, wherever the interrupt finds it."""
    begun.lock()  # somebody drives the run
    process = subprocess.Popen(
        [*COMMAND, "attach", str(begun.path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "iteration-001/generation" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 130
    assert said == "interrupted; the same command continues.\n"
