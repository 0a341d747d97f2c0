"""Pushing a run to the Hub, against a double of it (hub_double.py): what gets there, once, whatever goes wrong."""

import contextlib
import email.utils
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from forked import Forked
from handmade import HandmadeRun
from hub_double import Account, Blob, Fault, HubDouble
from huggingface_hub import constants
from pipelines_cluster import FakeCluster
from pipelines_slurm_run import SlurmRun
from pipelines_smallest import COMMAND, pipeline, write_pretended

from annotation.data.selection import SelectConfig, SelectScoresConfig
from annotation.stages.selection import SELECT, SELECT_SCORES
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.records import Rollout, Score
from contracts.stage import run_stage
from pipelines.config.run import RunConfig
from pipelines.config.sections import HubSection
from pipelines.environments.locked import interpreter
from pipelines.hub import failures, parquet
from pipelines.hub.access import check_access
from pipelines.hub.push import Pusher
from pipelines.main import main
from pipelines.run.directory import RunDirectory
from pipelines.run.events import HubPushed, HubPushFailed
from pipelines.run.fork import fork
from pipelines.run.retention import compress

MODEL, PAIRS, ROLLOUTS = "alice/made", "alice/made-pairs", "ateam/made-rollouts"
HUB = {"model": MODEL, "pairs": PAIRS, "rollouts": ROLLOUTS}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """A double, which this process and those that it starts take for the Hub."""
    with HubDouble() as double:
        for name, value in double.variables.items():
            monkeypatch.setenv(name, value)
        point_at(double, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(failures, "FIRST_PAUSE", 0.02)
        yield double


def point_at(double: HubDouble, patch: pytest.MonkeyPatch) -> None:
    """Have this process take a double for the Hub."""
    patch.setattr(constants, "ENDPOINT", double.endpoint)
    template = f"{double.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


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


def configure(run: Path, folder: Path, hub: dict[str, Any], **prompts: Any) -> None:
    """Write what a run's last command said."""
    source = {"source": str(folder / "prompts.jsonl")}
    rule = {"kind": "rule", "function": f"{folder}/rules.py:long"}
    settings = {
        "name": "handmade",
        "policy": str(folder / "model"),
        "prompts": {"train": source, "heldout": source, **prompts},
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


def test_push_checkpoints(hub: HubDouble, run: Path, template: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        texts = tree["provenance.json"].data.decode() + tree["README.md"].data.decode()
        assert "3 prompts with 3 answers each" in texts
        assert "3 pairs of these, chosen by `max_min`" in texts
        assert str(run.parent) not in texts
        assert str(template) not in texts, "a path of this machine"
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
        point_at(other, patch)
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


def test_a_card_that_people_have_written_stays(hub: HubDouble, run: Path) -> None:
    """That of a repo made by hand, and one that was changed, also over several iterations; ours is renewed."""
    theirs = b"---\nlicense: mit\n---\nAbout my model.\n"
    hub.create("alice/by-hand", README__md=theirs)
    assert main(["push", str(run), "hub.model=alice/by-hand"]) == 0
    assert hub.repo("alice/by-hand").tree("iteration-2")["README.md"].data == theirs
    assert main(["push", str(run), "--iteration", "1"]) == 0
    repo = hub.repo(MODEL)
    first = repo.tree()["README.md"].data
    assert b"iteration 1" in first
    with_words = first.replace(b"## Limits", b"It is rude.\n\n## Limits")
    repo.commit("main", repo.branches["main"], "words", "", {**repo.tree(), "README.md": Blob(with_words)})
    assert main(["push", str(run)]) == 0
    assert repo.tree("iteration-2")["README.md"].data == with_words


def test_foreign_repo_is_refused(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A repo with somebody's files stays as it is; one that is empty is taken."""
    hub.create(MODEL, weights__bin=b"precious")
    state = hub.state()
    assert main(["push", str(run)]) == 2
    out = capsys.readouterr().out
    assert f"{MODEL} exists and has files that no run of Ratchet has pushed (weights.bin)" in out
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


def test_a_repo_is_named_by_the_run(hub: HubDouble, run: Path) -> None:
    """Runs of one configuration do not meet in one repo."""
    assert main(["push", str(run), "hub.model=alice/the-{name}"]) == 0
    assert [id for _, id in hub.repos] == ["alice/the-handmade"]


def test_the_hub_says_how_long_to_wait(hub: HubDouble, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After, in seconds or as a date, is the least pause before the next try."""
    pauses: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", pauses.append)
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    for asked in ("7", later, "nonsense"):
        hub.faults.append(Fault("POST .*/commit", status=429, headers={"Retry-After": asked}))
    assert main(["push", str(run)]) == 0
    pauses = [pause for pause in pauses if pause]  # the double sleeps for none
    assert pauses[0] == 7
    assert 90 < pauses[1] <= 100
    assert pauses[2] <= 1


def test_more_iterations_come_after_the_report(hub: HubDouble, run: Path) -> None:
    """A run that ended, was reported and goes on: its next iteration is one more commit, and the report a newer one."""
    record = json.loads((run / "run.json").read_text())
    for iterations, report in ((1, b"first"), (2, b"second")):
        (run / "run.json").write_text(json.dumps({**record, "iterations": iterations}))
        (run / "report.html").write_bytes(report)
        assert main(["push", str(run)]) == 0
    repo = hub.repo(MODEL)
    assert [commit.title for commit in repo.log()] == [
        "handmade: report",
        "handmade, iteration 2: checkpoint",
        "handmade: report",
        "handmade, iteration 1: checkpoint",
        "initial commit",
    ]
    assert repo.tree()["report.html"].data == b"second"
    assert "iteration 2" in repo.tree()["README.md"].data.decode()


def test_a_fork_is_pushed_only_where_it_says(hub: HubDouble, run: Path) -> None:
    """The repos of a run are not those of its forks."""
    source = RunDirectory(run)
    for overrides, wanted in (([], None), (["hub.model=alice/fork"], "alice/fork")):
        target, _ = fork(source, 2, overrides, None)
        section = RunDirectory(target).config.hub
        assert (section and section.model) == wanted


def test_nothing_is_ready(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An iteration that is not there is no mistake: it may come."""
    assert main(["push", str(run), "--iteration", "9"]) == 0
    assert "has no iteration 9 to push yet" in capsys.readouterr().out
    assert hub.repos == {}


def test_one_at_a_time(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While a run pushes itself, a push by hand says so, and does not wait for the run's end."""
    with Pusher(RunDirectory(run), HubSection(model=MODEL)).exclusive():
        assert main(["push", str(run)]) == 2
        assert "is being pushed right now by another process" in capsys.readouterr().err
        assert main(["push", str(run), "--dry-run"]) == 0
    assert main(["push", str(run)]) == 0


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
        (["hub.model=alice"], "'alice' is not a valid name of a repo on the Hub. Write it ORG/NAME"),
        (["hub.pairs=a/b", "hub.rollouts=a/b"], "each needs a repo of its own"),
        (["training.epochs=2"], "only keys of the section `hub`"),
        (["hub.model=null"], "has no repo on the Hub to push to"),
    ],
)
def test_mistakes(run: Path, overrides: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake is one message."""
    assert main(["push", str(run), *overrides]) == 2
    assert said in capsys.readouterr().err


# What doctor says.


def access(**section: Any) -> list[tuple[str, str]]:
    """The findings, with their levels."""
    return [(finding.level, finding.found) for finding in check_access(HubSection(**section))]


def test_doctor_finds_what_would_refuse_a_push(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token, the namespace, what is in the repos; nothing is changed."""
    hub.create(PAIRS, "dataset")
    hub.create(ROLLOUTS, "dataset", theirs__csv=b"a,b")
    hub.create("bob/closed")
    state = hub.state()
    found = access(**HUB)
    assert found[:2] == [("ok", f"{MODEL} will be created"), ("ok", f"{PAIRS} exists, and the token may write there")]
    assert found[2][0] == "error"
    assert "has files that no run of Ratchet has pushed (theirs.csv)" in found[2][1]
    assert access(model="bob/closed") == [
        ("error", "the section hub pushes to bob/closed, but alice is not a member of bob")
    ]
    hub.tokens["hf_reader"] = Account(role="read")
    for token, said in (("hf_reader", "may only read"), ("hf_wrong", "The Hub refuses the token")):
        monkeypatch.setenv("HF_TOKEN", token)
        ((level, text),) = access(model=MODEL)
        assert level == "error"
        assert said in text
    assert hub.state() == state


def test_doctor_without_a_network_or_a_token(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage is a warning; no token is an error."""
    hub.faults.append(Fault(times=1000, status=503))
    monkeypatch.setattr(failures, "LONGEST_PAUSE", 6.0)
    monkeypatch.setattr(failures, "FIRST_PAUSE", 20.0)
    ((level, text),) = access(model=MODEL)
    assert (level, "503" in text) == ("warning", True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    assert access(model=MODEL) == [
        ("error", "no token for the Hugging Face Hub was found, which the section hub needs")
    ]


# Data sets.


@pytest.mark.slow
def test_push_data_sets(hub: HubDouble, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs as they were published, rollouts with their scores, a split for each iteration, and cards."""
    configure(run, run.parent.parent, {"pairs": PAIRS, "rollouts": ROLLOUTS})
    assert main(["push", str(run)]) == 0, capsys.readouterr().out
    pairs, rollouts = hub.repo(PAIRS, "dataset"), hub.repo(ROLLOUTS, "dataset")
    for iteration in (1, 2):
        here = run / f"iteration-{iteration:03d}"
        file = f"data/iteration_{iteration}.parquet"
        assert pairs.tree("iteration-2")[file].data == (here / "pairs/train.parquet").read_bytes()
        rows = parquet_rows(rollouts.tree("iteration-2")[file].data)
        published = [msgspec.to_builtins(row) for row in Artifact.open(here / "generation").rows(Rollout)]
        scores = {(row.prompt_id, row.sample): row.score for row in Artifact.open(here / "reward").rows(Score)}
        assert [row.pop("scores")["reward"] for row in rows] == [
            [scores[row["prompt_id"], answer["sample"]] for answer in row["completions"]] for row in published
        ]
        assert rows == json.loads(json.dumps(published))
    card = rollouts.tree()["README.md"].data.decode()
    data = yaml.safe_load(card.split("---")[1])["configs"][0]["data_files"]
    assert data == [{"split": f"iteration_{n}", "path": f"data/iteration_{n}.parquet"} for n in (1, 2)]
    assert "iteration_2" not in rollouts.tree("iteration-1")["README.md"].data.decode()
    state = hub.state()
    assert main(["push", str(run)]) == 0
    assert hub.state() == state


@pytest.mark.slow
def test_with_dynamic_sampling_the_selected_rollouts_are_pushed_with_the_parts_of_scores(
    hub: HubDouble, tmp_path: Path
) -> None:
    def with_parts(name: str, rows: list[Any]) -> list[Any]:
        if not name.endswith("/reward"):
            return rows
        return [msgspec.structs.replace(row, parts={"twice": 2 * row.score} if row.sample else {}) for row in rows]

    run = HandmadeRun(tmp_path, with_parts).build().path
    configure(run, run.parent.parent, {"rollouts": ROLLOUTS}, dynamic_sampling={"rounds": 1}, per_iteration=3)
    here = run / "iteration-001"
    scores = {row.prompt_id: row.score for row in Artifact.open(here / "reward").rows(Score)}
    rounds = {"rounds": [here / "generation"], "scores": [here / "reward"]}
    run_stage(SELECT, SelectConfig(output=here / "selected/rollouts", **rounds, margin=0.5))
    chosen = {"rollouts": here / "selected/rollouts", **rounds}
    run_stage(SELECT_SCORES, SelectScoresConfig(output=here / "selected/reward", **chosen))
    (here / "selected/rollouts").rename(here / "selected/later")
    assert main(["push", str(run)]) == 0
    assert not hub.repos, "the first round alone is not what it is trained on"
    (here / "selected/later").rename(here / "selected/rollouts")
    assert main(["push", str(run)]) == 0
    tree = hub.repo(ROLLOUTS, "dataset").tree("iteration-1")
    rows = parquet_rows(tree["data/iteration_1.parquet"].data)
    selected = Artifact.open(here / "selected/rollouts")
    assert [row["prompt_id"] for row in rows] == [row.prompt_id for row in selected.rows(Rollout)]
    for row in rows:
        found = row["scores"]["reward"]
        assert row["score_parts"] == {"reward": {"twice": [None, *(2 * score for score in found[1:])]}}
        assert max(found) - min(found) >= 0.5
    assert {row["prompt_id"] for row in rows} <= scores.keys()
    made_of = json.loads(tree["provenance/iteration_1.json"].data)
    assert (made_of["stage"], made_of["digest"]) == ("select", selected.manifest.digest)
    card = tree["README.md"].data.decode()
    assert "prompts whose answers all score the same were replaced by others" in card
    assert "iteration 1: selected/rollouts" in card


@pytest.mark.slow
def test_one_process_writes_all_rollouts(hub: HubDouble, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its imports take longer than an iteration's rows; where it was killed, the next is written by another one."""
    started: list[parquet._Process] = []

    class Counted(parquet._Process):
        def __init__(self, config: RunConfig) -> None:
            super().__init__(config)
            started.append(self)

    monkeypatch.setattr(parquet, "_Process", Counted)
    configure(run, run.parent.parent, {"rollouts": ROLLOUTS})
    assert main(["push", str(run)]) == 0
    assert len(started) == 1
    assert started[0]._process.returncode is not None
    writer = parquet.RolloutsWriter(RunDirectory(run))
    scores, target = {"reward": run / "iteration-001/reward"}, run / "rollouts.parquet"
    writer.write(run / "iteration-001/generation", scores, target)
    written = target.read_bytes()
    assert written == hub.repo(ROLLOUTS, "dataset").tree("iteration-1")["data/iteration_1.parquet"].data
    with pytest.raises(UserError, match="iteration-003 does not exist"):
        writer.write(run / "iteration-003", scores, target)
    started[1]._process.kill()
    with pytest.raises(UserError, match=r"could not be written as Parquet: .*\(exit code -9\)"):
        writer.write(run / "iteration-001/generation", scores, target)
    writer.write(run / "iteration-001/generation", scores, target)
    assert target.read_bytes() == written
    assert len(started) == 3
    writer.close()


def parquet_rows(content: bytes) -> list[dict[str, Any]]:
    """The rows of a Parquet file, read where there is pyarrow.

    From a path: a file of Python's is let go by one of Arrow's threads, which may be after Python's end and aborts the
    process then (apache/arrow#33975).
    """
    program = "import json, sys, pyarrow.parquet as pq\nprint(json.dumps(pq.read_table(sys.argv[1]).to_pylist()))"
    python = str(interpreter("annotation"))
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        file.write(content)
        file.flush()
        result = subprocess.run([python, "-c", program, file.name], capture_output=True, check=True)
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.slow
def test_rollouts_that_compression_has_packed(hub: HubDouble, run: Path) -> None:
    """The same rows, whether they lie compressed or not."""
    configure(run, run.parent.parent, {"rollouts": ROLLOUTS})
    assert main(["push", str(run), "--iteration", "1"]) == 0
    with HubDouble() as other:
        compress(Artifact.open(run / "iteration-001/generation"))
        compress(Artifact.open(run / "iteration-001/reward"))
        with pytest.MonkeyPatch.context() as patch:
            point_at(other, patch)
            assert main(["push", str(run), "--iteration", "1"]) == 0
        assert other.state() == hub.state()


@pytest.mark.slow
def test_no_place_for_parquet(hub: HubDouble, run: Path) -> None:
    """A disk that is full in the middle of it is told, and hurts nothing else."""
    configure(run, run.parent.parent, {"model": MODEL, "rollouts": ROLLOUTS})
    (run / ".hub").mkdir()
    script = f"mount -t tmpfs -o size=4k tmpfs '{run}/.hub' && exec {shlex.join([*COMMAND, 'push', str(run)])}"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "No space left on device" in result.stdout
    assert set(hub.repo(MODEL).tags) == {"iteration-1", "iteration-2"}
    assert main(["push", str(run)]) == 0
    assert set(hub.repo(ROLLOUTS, "dataset").tags) == {"iteration-1", "iteration-2"}


# While a run goes on.


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Config file of a run whose stages only pretend to work, which is pushed."""
    path = write_pretended(tmp_path)
    settings = yaml.safe_load(path.read_text())
    settings["hub"] = {"model": MODEL, "wait_seconds": 60}
    path.write_text(yaml.safe_dump(settings))
    return path


def pretended(config: Path) -> Path:
    """Its directory."""
    return config.parent / "runs" / "pretended"


@pytest.mark.slow
def test_a_run_pushes_every_iteration(hub: HubDouble, config: Path) -> None:
    """When the command ends, everything is on the Hub: the same as if it had been pushed by hand afterwards."""
    result = pipeline("run", str(config), "--iters", "2")
    assert result.returncode == 0, result.stderr
    assert f"pushed iteration-2 to {MODEL}" in result.stdout
    run = pretended(config)
    assert events(run) == [("HubPushed", MODEL, what) for what in ("iteration-1", "iteration-2", "report")]
    repo = hub.repo(MODEL)
    assert set(repo.tags) == {"iteration-1", "iteration-2"}
    assert repo.tree()["report.html"].data == (run / "report.html").read_bytes()
    assert "report.html" not in repo.tree("iteration-2"), "the report comes last"
    with HubDouble() as other:
        assert main_elsewhere(other, run) == 0
        assert hub.state() == other.state()
    hub.requests.clear()
    assert pipeline("run", str(config), "--iters", "2").returncode == 0
    assert hub.requests == [], "a finished run asked the Hub"


@pytest.mark.slow
def test_a_revoked_token_does_not_end_a_run(hub: HubDouble, config: Path) -> None:
    """The run goes on and ends well; what was not pushed is told once, and pushed later."""
    said = "The Hub refuses the token"
    hub.faults.append(Fault(times=10000, after=8, status=401))
    result = pipeline("run", str(config), "--iters", "1", "hub.patience_seconds=1")
    assert result.returncode == 0, result.stderr
    run = pretended(config)
    failed = [kind for kind, *_ in events(run) if kind == "HubPushFailed"]
    assert len(failed) == 1
    assert result.stdout.count(said) == 1
    assert said in pipeline("status", str(run)).stdout
    hub.faults.clear()
    assert main(["push", str(run)]) == 0
    assert set(hub.repo(MODEL).tags) == {"iteration-1"}


@pytest.mark.slow
def test_the_push_is_killed_again_and_again(hub: HubDouble, run: Path) -> None:
    """Killed at whatever request, before or after it is done, the next one goes on; in the end nothing is twice."""
    with HubDouble() as other:
        assert main_elsewhere(other, run) == 0
        undisturbed = other.state()
    chance, kills = random.Random(1), 0
    for _ in range(10):
        process = Forked("pipelines", "push", str(run))
        # Either the request is never done, or it is, and nobody hears of it.
        undone = chance.choice((0, None))
        hub.faults = [Fault(after=chance.randrange(9), call=process.kill, cut_request=undone)]
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 5
    hub.faults = []
    assert main(["push", str(run)]) == 0
    assert hub.state() == undisturbed
    assert events(run) == [("HubPushed", MODEL, "iteration-1"), ("HubPushed", MODEL, "iteration-2")]


@pytest.mark.chaos
def test_driver_and_pusher_are_killed(hub: HubDouble, config: Path) -> None:
    """Whoever is killed at random: in the end the Hub has what an undisturbed run has put there, once."""
    run, chance, killed = pretended(config), random.Random(0), 0

    def kill_pusher() -> None:
        nonlocal killed
        for pid in pushers(run):
            os.kill(pid, signal.SIGKILL)
            killed += 1

    for undone in (0, None, 0, None):  # the request is never done, or it is, and nobody hears of it
        hub.faults.append(Fault(after=chance.randrange(4), call=kill_pusher, cut_request=undone))
    for number in range(20):
        spared = not any(fault.times for fault in hub.faults)
        driver = Forked("pipelines", "run", str(config), "--iters", "2")
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(chance.uniform(0.1, 5.0) if number < 4 else 100)
        driver.kill()
        if driver.wait() == 0 and spared:
            break
    assert killed == len(hub.faults)
    assert pushers(run) == []
    hub.faults.clear()
    with HubDouble() as other:
        assert main_elsewhere(other, run) == 0
        assert hub.state() == other.state()
    assert sorted(set(events(run))) == sorted(events(run)), "something was told twice"


def pushers(run: Path) -> list[int]:
    """The processes that push a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"pipelines.hub\0{run}\0" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_weights_wait_for_the_hub(hub: HubDouble, config: Path) -> None:
    """An outage does not end a run either, and retention deletes no weights that are not on the Hub yet."""
    said = "the Hub could not be reached"
    hub.faults.append(Fault(times=10000, cut_answer=0))
    keep = ["retention.keep=last 1", "hub.patience_seconds=0"]
    result = pipeline("run", str(config), "--iters", "2", *keep)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(said) == 1, "told more than once"
    run = pretended(config)
    assert said in pipeline("status", str(run)).stdout
    weights = [run / f"iteration-{number:03d}/training/model.safetensors" for number in (1, 2)]
    assert all(path.exists() for path in weights)
    dry = pipeline("gc", str(run), "--dry-run")
    assert "not on the Hub yet" in dry.stdout
    hub.faults.clear()
    assert main(["push", str(run)]) == 0
    assert pipeline("gc", str(run)).returncode == 0
    assert [path.exists() for path in weights] == [False, True]
    assert set(hub.repo(MODEL).tags) == {"iteration-1", "iteration-2"}


@pytest.mark.slow
def test_a_detached_run_pushes_from_its_jobs(hub: HubDouble, tmp_path: Path, fake_cluster: FakeCluster) -> None:
    """No driver is there; the jobs that finalize the evaluations push, and nothing of a push is left behind."""
    detached = SlurmRun.pretended(tmp_path, fake_cluster)
    settings = yaml.safe_load(detached.config.read_text())
    detached.config.write_text(yaml.safe_dump({**settings, "hub": {"model": MODEL}}))
    detached.detach(iterations=1)
    detached.wait()
    assert events(detached.path) == [("HubPushed", MODEL, "iteration-1"), ("HubPushed", MODEL, "report")]
    assert set(hub.repo(MODEL).tags) == {"iteration-1"}
    assert pushers(detached.path) == []
