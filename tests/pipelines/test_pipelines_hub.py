"""Pushing a run to the Hub, against a double of it (hub_double.py): what gets there, once, whatever goes wrong."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from handmade import HandmadeRun
from hub_double import Account, Blob, Fault, HubDouble
from huggingface_hub import constants

from contracts.artifacts import Artifact
from pipelines.hub import failures
from pipelines.main import main
from pipelines.run.directory import RunDirectory
from pipelines.run.events import HubPushed, HubPushFailed

MODEL, PAIRS, ROLLOUTS = "alice/made", "alice/made-pairs", "ateam/made-rollouts"
HUB = {"model": MODEL, "pairs": PAIRS, "rollouts": ROLLOUTS}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """A double, which this process and those that it starts take for the Hub."""
    with HubDouble() as double:
        for name, value in double.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", double.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(failures, "FIRST_PAUSE", 0.02)
        yield double


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two iterations; nobody changes it."""
    folder = tmp_path_factory.mktemp("hub")
    HandmadeRun(folder).build()
    return folder


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    """A copy of the run, which is to be pushed."""
    path = tmp_path / "runs" / "handmade"
    shutil.copytree(template / "runs" / "handmade", path)
    configure(path, template, {"model": MODEL})
    return path


def configure(run: Path, folder: Path, hub: dict[str, Any]) -> None:
    """Write what a run's last command said."""
    source = {"source": str(folder / "prompts.jsonl")}
    rule = {"kind": "rule", "function": "embedded.reviews:well_formed"}
    settings = {
        "name": "handmade",
        "policy": str(folder / "model"),
        "prompts": {"train": source, "heldout": source},
        "scorers": {"reward": rule, "gold": rule},
        "generation": {"k": 3},
        "hub": hub,
    }
    (run / "run.json").write_text(json.dumps({"config": "handmade.yaml", "iterations": 2, "settings": settings}))


def events(run: Path) -> list[tuple[str, str, str]]:
    """What was told of pushes: the kind of event, the repo and what."""
    found = RunDirectory(run).events()
    return [
        (type(event).__name__, event.repo, event.what)
        for event in found
        if isinstance(event, HubPushed | HubPushFailed)
    ]


def test_push_checkpoints(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every iteration becomes a commit and a tag, whose files are those that were published."""
    before = snapshot(run)
    assert main(["push", str(run)]) == 0
    assert f"on the Hub       iteration-2 of the model {MODEL}" in capsys.readouterr().out
    repo = hub.repo(MODEL)
    assert repo.private
    assert set(repo.tags) == {"iteration-1", "iteration-2"}
    for iteration in (1, 2):
        published = Artifact.open(run / f"iteration-{iteration:03d}/training")
        tree = repo.tree(f"iteration-{iteration}")
        for file in published.manifest.files:
            assert hashlib.sha256(tree[file.path].data).hexdigest() == file.sha256
        provenance = json.loads(tree["provenance.json"].data)
        assert provenance["key"] == published.manifest.key
        assert str(run) not in tree["provenance.json"].data.decode() + tree["README.md"].data.decode()
    assert [commit.title for commit in repo.log()][:2] == [
        "handmade, iteration 2: checkpoint",
        "handmade, iteration 1: checkpoint",
    ]
    assert snapshot(run) == before
    assert events(run) == [("HubPushed", MODEL, "iteration-1"), ("HubPushed", MODEL, "iteration-2")]


def snapshot(run: Path) -> dict[str, tuple[int, float]]:
    """Every published file, with its size and the time of its last change; of directories as well."""
    paths = [path for path in run.rglob("*") if path.relative_to(run).parts[0].startswith(("iteration", "prompts"))]
    return {str(path): (path.stat().st_size, path.stat().st_mtime) for path in paths}


def test_push_again_is_nothing(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there is recognised by its content, also without the run's events; nothing is sent."""
    main(["push", str(run)])
    state = hub.state()
    (run / "events.jsonl").unlink()
    hub.requests.clear()
    capsys.readouterr()
    assert main(["push", str(run), "--json"]) == 0
    assert [(entry["what"], entry["state"]) for entry in json.loads(capsys.readouterr().out)] == [
        ("iteration-1", "on the Hub"),
        ("iteration-2", "on the Hub"),
    ]
    assert hub.state() == state
    assert {request.split()[0] for request in hub.requests} == {"GET"}


def test_dry_run_changes_nothing(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry-run` asks and writes nothing; `--iteration` takes one."""
    assert main(["push", str(run), "--iteration", "1"]) == 0
    capsys.readouterr()
    state = hub.state()
    assert main(["push", str(run), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["on the Hub", "would be pushed"]
    assert hub.state() == state
    assert len(events(run)) == 1


FAULTS = {
    "429": Fault("POST .*/commit", status=429, headers={"Retry-After": "0"}),
    "503 at the store": Fault("PUT /_lfs", status=503),
    "500": Fault("POST .*/tag", times=2, status=500),
    "the repo is made, the answer lost": Fault("POST /api/repos/create", cut_answer=0),
    "upload cut": Fault("PUT /_lfs", cut_request=100),
    "upload done, the answer lost": Fault("PUT /_lfs", cut_answer=0),
    "commit cut": Fault("POST .*/commit", cut_request=1000),
    "commit done, the answer lost": Fault("POST .*/commit", cut_answer=0),
    "commit done, half of the answer": Fault("POST .*/commit", cut_answer=20),
    "tag done, the answer lost": Fault("POST .*/tag", cut_answer=0),
    "listing cut": Fault("GET .*/tree", cut_answer=30),
    "refs cut": Fault("GET .*/refs", times=2, cut_answer=0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_leave_no_trace(name: str, hub: HubDouble, run: Path) -> None:
    """Whatever goes wrong on the way, in the end everything is there, once."""
    fault = FAULTS[name]
    hub.faults.append(Fault(**vars(fault)))
    assert main(["push", str(run)]) == 0
    assert hub.faults[0].times == 0, "the fault was never met"
    with HubDouble() as other:
        assert main_elsewhere(other, run) == 0
        assert hub.state() == other.state()
    assert [kind for kind, *_ in events(run)] == ["HubPushed"] * 2


def main_elsewhere(other: HubDouble, run: Path) -> int:
    """Push a run to another double, where nothing goes wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", other.endpoint)
        copy = run.parent.parent / "other" / run.name
        shutil.copytree(run, copy)
        (copy / "events.jsonl").unlink(missing_ok=True)
        return main(["push", str(copy)])


def test_stale_parent(hub: HubDouble, run: Path) -> None:
    """Somebody commits in between: what they have written stays, and the iteration comes after it."""
    main(["push", str(run), "--iteration", "1"])
    repo, answer = hub.repo(MODEL), hub.open

    def interrupting(*arguments: Any, **options: Any) -> Any:
        if hub.requests[-1].endswith("/commit/main") and "notes.txt" not in repo.tree():
            tree = {**repo.tree(), "notes.txt": Blob(b"mine"), "README.md": Blob(b"my own words")}
            repo.commit("main", repo.branches["main"], "notes", "", tree)
        return answer(*arguments, **options)

    hub.open = interrupting  # type: ignore[method-assign]
    assert main(["push", str(run)]) == 0
    tree = repo.tree("iteration-2")
    assert tree["notes.txt"].data == b"mine"
    assert tree["README.md"].data == b"my own words", "the card was overwritten"
    titles = [commit.title for commit in repo.log()]
    assert titles[:3] == ["handmade, iteration 2: checkpoint", "notes", "handmade, iteration 1: checkpoint"]


def test_foreign_repo_is_refused(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A repo with somebody's files stays as it is; one that is empty is taken."""
    hub.create(MODEL, weights__bin=b"precious")
    state = hub.state()
    assert main(["push", str(run)]) == 2
    out = capsys.readouterr().out
    assert f"{MODEL} exists and holds what no run of Ratchet has pushed there (weights.bin)" in out
    assert "Name another repo, or delete that one" in out
    assert hub.state() == state
    assert main(["push", str(run)]) == 2
    assert events(run) == [("HubPushFailed", MODEL, "iteration-1")], "told more than once"
    hub.create("alice/empty", README__md=b"---\nlicense: mit\n---\n")
    assert main(["push", str(run), "hub.model=alice/empty"]) == 0


def test_other_content_under_a_tag_is_refused(
    hub: HubDouble, run: Path, template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another run's iterations are not replaced."""
    main(["push", str(run)])
    other = HandmadeRun(tmp_path / "other")
    other.salt = "other weights"
    other.build()
    configure(other.path, template, {"model": MODEL})
    state = hub.state()
    assert main(["push", str(other.path)]) == 2
    assert f"{MODEL} has a tag iteration-1 with other content than this run's" in capsys.readouterr().out
    assert hub.state() == state


def test_rights(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A token that is wrong, or may not write, is told with its fix, and never shown."""
    hub.tokens = {"hf_" + "r" * 20: Account(role="read")}
    with pytest.MonkeyPatch.context() as patch:
        for token, said in (("hf_" + "r" * 20, "may not write there"), ("hf_" + "x" * 20, "refuses the token")):
            patch.setenv("HF_TOKEN", token)
            assert main(["push", str(run)]) == 2
            out = capsys.readouterr().out
            assert said in out
            assert "HF_TOKEN" in out
            assert token not in out + (run / "events.jsonl").read_text()


def test_token_revoked_halfway(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was pushed before stays; a new token goes on from there."""
    hub.faults.append(Fault(times=1000, after=14, status=401))
    assert main(["push", str(run)]) == 2
    assert "refuses the token" in capsys.readouterr().out
    hub.faults.clear()
    assert main(["push", str(run)]) == 0
    assert events(run)[-1] == ("HubPushed", MODEL, "iteration-2")


def test_out_of_reach(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An outage that lasts ends in one message, and exit code 1: the same command may succeed later."""
    hub.faults.append(Fault(times=1000, status=503))
    assert main(["push", str(run), "hub.patience_seconds=0"]) == 1
    assert "the Hub answers 503" in capsys.readouterr().out


def test_damage_is_not_pushed(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not what its manifest says never gets to the Hub."""
    weights = run / "iteration-001/training/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert main(["push", str(run)]) == 2
    assert f"{weights} differs from its manifest" in capsys.readouterr().out
    assert hub.repo(MODEL).tags == {}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hub.model=alice"], "'alice' is no name of a repo on the Hub. Write it ORG/NAME"),
        (["hub.pairs=a/b", "hub.rollouts=a/b"], "each needs a repo of its own"),
        (["training.epochs=2"], "only keys of the section `hub`"),
        (["hub.model=null"], "says nowhere where on the Hub"),
    ],
)
def test_mistakes(run: Path, overrides: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake is one message."""
    assert main(["push", str(run), *overrides]) == 2
    assert said in capsys.readouterr().err
