"""Whatever a user gets wrong: one clear message, exit code 2, no traceback, and nothing lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pipelines_smallest import write_smallest

from contracts.fingerprint import digest
from contracts.ledger import Ledger
from contracts.publication import Publication
from contracts.records import CHECKPOINT
from pipelines.config.load import load_run_config
from pipelines.insight.listeners.metrics import listen
from pipelines.iteration import build_graph
from pipelines.main import main
from pipelines.run.directory import RunDirectory, dated

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "no JSON": lambda content: b"{",
    "a list": lambda content: b"[1]",
    "null": lambda content: b"null",
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "other keys": lambda content: b'{"config": 3, "nothing": {}}',
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A directory with a run of one iteration whose stages have all published something, and a copy of it."""
    here = tmp_path_factory.mktemp("bad input")
    smallest = write_smallest(here)
    config = dated(load_run_config(smallest, []))
    run = RunDirectory(config.run_directory)
    run.claim(config, smallest, 1)
    for node in build_graph(config, 1).nodes.values():
        publication = Publication(node.output, CHECKPOINT, node.config.stage, digest(node.name))
        publication.begin()
        publication.scratch("file").write_text(node.name)
        publication.commit("file", Ledger("rows"))
        facts = {"metrics": {"iteration": int(node.name[10:13]), "reward_mean": 0.5}} if "eval" in node.name else {}
        publication.publish(
            key_parts={}, inputs={}, input_paths={}, unit="rows", weights=None, versions={}, seconds={}, facts=facts
        )
    collect = listen(run, build_graph(config, 1))
    collect([])
    assert run._lock is not None
    run._lock.close()
    copy = here.with_name("copy of bad input")
    shutil.copytree(here, copy)
    return here, copy


@pytest.fixture
def run(pristine: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run as it was; the working directory is beside it."""
    here, copy = pristine
    shutil.rmtree(here)
    shutil.copytree(copy, here)
    monkeypatch.chdir(here)
    return here / "runs" / "smallest"


TELLING = {"lock", "events.jsonl", "report.txt", "report.html", "report.md", "report.samples"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but those that tell of commands, also of one that was refused."""
    files = [path for path in folder.rglob("*") if path.is_file() and TELLING.isdisjoint(path.parts)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must be refused properly, and return its message."""
    try:
        code = main(list(arguments))
    except SystemExit as end:  # argparse
        code = int(str(end.code))
    message = capsys.readouterr().err
    assert code == 2, message
    assert "Traceback" not in message
    assert "error: " in message
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run nothere.yaml", "nothere.yaml does not exist"),
        ("run .", "is a directory"),
        ("run smallest.yaml --iters -1", "--iters is -1"),
        ("run smallest.yaml --iters two", "invalid int value"),
        ("run smallest.yaml --iters 100000000", "from 0 to 10000"),
        ("run smallest.yaml --itres 2", "unrecognized arguments"),
        ("run smallest.yaml training.settings.beta", "write key=value"),
        ("run smallest.yaml training.settings.betta=1", "Did you mean 'beta'"),
        ("run smallest.yaml training=3", "'training' is 3"),
        ("run smallest.yaml training=null", "'training' is null, but it is a section. Leave it out"),
        ("run smallest.yaml training.settings.beta=[1", "not valid YAML"),
        ("run smallest.yaml training.settings.beta.gamma=1", "the setting 'beta'"),
        ("run smallest.yaml generation.k=1", "generation.k is 1"),
        ("run smallest.yaml generation.temperatures=[]", "temperatures"),
        ("run smallest.yaml scorers.reward.kind=oracle", "reward_model"),
        ("run smallest.yaml scorers.gold.function=rules.py:nope", "has no function 'nope'"),
        ("run smallest.yaml scorers.gold.function=rules.py", "write|no function"),
        ("run smallest.yaml scorers.gold.inputs=[nowhere.json]", "nowhere.json does not exist"),
        (
            "run smallest.yaml scorers.reward.inputs=[rules.py]",
            "is not a key of kind=reward_model; it is one of kind=rule",
        ),
        ("run smallest.yaml scorers.gold.seconds_per_sample=0", "seconds_per_sample"),
        ("run smallest.yaml reward_model.label=silver", "silver"),
        ("run smallest.yaml reference=next", "reference"),
        ("run smallest.yaml changes=[1,2]", "'changes'"),
        ("run smallest.yaml changes.1=5", "'changes.1' is 5"),
        ("run smallest.yaml changes.one.training.settings.beta=1", "changes: 'one'"),
        ("run smallest.yaml changes.0.training.settings.beta=1", "from iteration 1 on"),
        ("run smallest.yaml changes.1.world.seed=1", "world cannot change"),
        ("run smallest.yaml changes.1.training.settings.bta=1", "Did you mean"),
        ("run smallest.yaml executor.retries=-1", "executor.retries"),
        ("run smallest.yaml executor.stall_seconds=0", "executor.stall_seconds"),
        ("run smallest.yaml executor.kind=slurmm", "executor.kind"),
        ("run smallest.yaml name=../x", "name"),
        ("run smallest.yaml directory=rules.py --dry-run", "rules.py is not a directory"),
        ("run smallest.yaml directory=/proc/nothing", "cannot be created"),
        (f"run smallest.yaml name={'a' * 300} --dry-run", "name"),
        ("run smallest.yaml policy=nothere", "nothere does not exist"),
        ("run smallest.yaml policy=world:nothere", "world:nothere does not exist"),
        ("run smallest.yaml environments.training.python=/no/python", "not an executable"),
        ("run smallest.yaml --force nothere", "no such stage"),
        ("run smallest.yaml --force iteration-001/trainin", "Did you mean 'iteration-001/training'"),
        ("run smallest.yaml --force ../..", "no such stage"),
        ("run other.yaml", "is the run of"),
        ("status nothere", "not the directory of a run"),
        ("status rules.py", "not the directory of a run"),
        ("status runs/smallest/iteration-001", "not the directory of a run"),
        ("compare runs/smallest nothere", "nothere is not the directory of a run"),
        ("fork nothere --from-iteration 1", "not the directory of a run"),
        ("fork runs/smallest", "--from-iteration"),
        ("fork runs/smallest --from-iteration one", "invalid int value"),
        ("fork runs/smallest --from-iteration 3", "give 1 to 2"),
        ("fork runs/smallest --from-iteration 1 policy=x", "'policy' cannot change"),
        ("fork runs/smallest --from-iteration 1 training.settings.beta=x", "the setting 'beta'"),
        ("fork runs/smallest --from-iteration 1 --name smallest", "exists already"),
        ("fork runs/smallest --from-iteration 1 --name ../x", "plain name"),
        ("rn smallest.yaml", "Did you mean 'run'"),
        ("", "required"),
    ],
)
def test_a_mistake_on_the_command_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    here = run.parents[1]
    (here / "other.yaml").write_text((here / "smallest.yaml").read_text())
    before = contents(run.parent)
    said = refused(capsys, *arguments.split())
    assert any(part in said for part in message.split("|")), said
    assert contents(run.parent) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "required but not set"),
        (b"- a\n", "found a list"),
        (b"a:\n\tb: 1\n", "line 2"),
        (b"name: x\nname: y\n", "occurs twice"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a: &a [*a]\n", "contains itself"),
        (b"a: !!python/object/apply:os.system [true]\n", "not valid YAML"),
        (b"name: [1, 2\n", "not valid YAML"),
    ],
)
def test_a_config_file_that_is_none(run: Path, capsys: pytest.CaptureFixture[str], text: bytes, message: str) -> None:
    Path("bad.yaml").write_bytes(text)
    assert message in refused(capsys, "run", "bad.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("run.json", "status runs/smallest"),
        ("run.json", "fork runs/smallest --from-iteration 1"),
        ("setup/world/manifest.json", "run smallest.yaml --iters 1"),
        ("setup/world/manifest.json", "run smallest.yaml --iters 1 --dry-run"),
        ("iteration-001/evaluation/manifest.json", "status runs/smallest"),
        ("forced.json", "run smallest.yaml --iters 1 --force setup/sft"),
        ("iteration-001/evaluation/manifest.json", "compare runs/smallest"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, command: str, damage: str
) -> None:
    path = run / file
    content = path.read_bytes() if path.exists() else json.dumps({"stage": {"digest": "x", "inode": 1}}).encode()
    path.write_bytes(DAMAGE[damage](content))
    before = contents(run.parent)
    said = refused(capsys, *command.split())
    assert os.path.basename(file) in said
    assert contents(run.parent) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "dangling link", "pipe"])
@pytest.mark.parametrize(
    "name", ["run.json", "lock", "events.jsonl", "metrics.jsonl", "config.resolved.yaml", "pinned"]
)
def test_something_else_in_the_place_of_a_runs_file(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    path = run / name
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/nonexistent/file")
    for command in ("run smallest.yaml --iters 1", "status runs/smallest", "gc runs/smallest", "verify runs/smallest"):
        assert f"{name} is not a regular file" in refused(capsys, *command.split())


def test_a_rule_that_cannot_be_used_is_told_before_anything_runs(
    smallest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when only a module of the user's own that it imports has changed since it was found right."""
    monkeypatch.chdir(smallest.parent)
    rules, helper = smallest.parent / "rules.py", smallest.parent / "weights_of_mine.py"
    rules.write_text("import weights_of_mine\n" + rules.read_text())
    helper.write_text("")
    main(["doctor", "smallest.yaml"])
    assert "weights_of_mine" not in capsys.readouterr().out
    helper.write_text("raise SystemExit(7)\n")
    assert f"{rules}:variety' cannot be imported: SystemExit: 7" in refused(capsys, "run", "smallest.yaml")
    helper.write_text("")
    rules.write_text("def variety(prompt, response): ...\n")
    assert "takes (prompt, response), but is called with" in refused(capsys, "run", "smallest.yaml")
    assert main(["doctor", "smallest.yaml"]) == 2
    assert "takes (prompt, response), but is called with" in capsys.readouterr().out
    assert not (smallest.parent / "runs/smallest/setup").exists()
