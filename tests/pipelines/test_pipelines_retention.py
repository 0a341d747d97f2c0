"""Retention: what is deleted and compressed, what never is, and that nothing is lost by it, killed or not.

But for the last test, the driver is the real one and the stages are small things in their place, which fail where an
input is not whole.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from killing import is_killed_at
from pipelines_smallest import FinishedRun
from rich.console import Console
from small_stages import make, without_environments

import pipelines.execution.driver
import pipelines.execution.lifecycle
import pipelines.run.verdicts
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fingerprint import RELEASED
from contracts.manifest import MANIFEST
from contracts.models import ModelInfo
from contracts.publication import partial_directory
from pipelines.config.load import load_run_config
from pipelines.execution.driver import Driver
from pipelines.execution.executors.base import Executor, Site
from pipelines.execution.supervisor import REQUEST, AttemptRequest
from pipelines.graph import Graph, Node
from pipelines.insight.display import Display
from pipelines.insight.status import print_status
from pipelines.iteration import build_graph
from pipelines.job import ENTRY
from pipelines.main import main
from pipelines.planning.placement import placed_graph
from pipelines.run.directory import RunDirectory
from pipelines.run.events import JobEnded
from pipelines.run.fork import CONFIG, fork
from pipelines.run.gc import collect, up_to_date
from pipelines.run.retention import compress, release, why_kept


class Stages(Executor):
    """An executor, and its only job, which publishes what depends on a stage's key, and on `salt` if that is set."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.started: list[str] = []
        self.salt = ""
        self.after: Callable[[], None] = lambda: None

    kind = "local"
    pid: int | None = None

    def submit(self, node: Node, attempt: Path) -> "Stages":  # type: ignore[override]
        self.started.append(node.name)
        (attempt / REQUEST).write_bytes(msgspec.json.encode(AttemptRequest([], {}, [], "", "", None)))
        make(node, self.salt)
        self.after()
        return self

    def ended(self) -> bool:
        return True

    def news(self) -> None:
        pass

    def clear(self) -> list[JobEnded]:
        return []


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """The driver asks no environment, waits for nothing and leaves the signals alone."""
    if "real" in request.node.name:
        yield
        return
    without_environments(monkeypatch)
    monkeypatch.setattr(pipelines.execution.driver, "POLL_SECONDS", 0.0)
    yield


class Run:
    """A run, driven by one command after another."""

    def __init__(self, config: Path, *overrides: str) -> None:
        self.config = config
        self.overrides = list(overrides)
        self.path = load_run_config(config, self.overrides).run_directory
        self.lines = ""

    def drive(self, iterations: int, *overrides: str, prepare: Callable[[Stages], None] = lambda _: None) -> list[str]:
        """The names of the stages that were run."""
        config = load_run_config(self.config, [*self.overrides, *overrides])
        graph = placed_graph(config, iterations)
        run = RunDirectory(self.path)
        run.claim(config, self.config, iterations)
        console = Console(file=io.StringIO(), width=200)
        site = Site(run, graph, config, ENTRY)
        driver = Driver(site, [Display(console, run, graph)])
        driver.executors._made["local"] = stages = Stages(site)
        prepare(stages)
        try:
            driver.drive()
        finally:
            self.lines = console.file.getvalue()  # type: ignore[attr-defined]
            assert run._lock is not None
            run._lock.close()
        return stages.started

    def collect(self, keep: str, **options: bool) -> list[str]:
        """The lines that gc writes."""
        pack = options.pop("pack", False)
        config = load_run_config(self.config, [f"retention.keep={keep}", f"retention.compress={pack}"])
        run, console = RunDirectory.existing(self.path), Console(file=io.StringIO(), width=200)
        chosen = {"superseded": False, "dry_run": False, **options}
        try:
            collect(console, run, config.retention, lambda: 0, **chosen)
        finally:
            if run._lock is not None:
                run._lock.close()
        return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]

    @property
    def graph(self) -> Graph:
        run = RunDirectory.existing(self.path)
        return build_graph(run.config, run.iterations)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]

    def digests(self) -> dict[str, str]:
        return digests(self.path)

    def released(self) -> list[str]:
        """The stages whose weights are gone, and are said to be."""
        found = [path.parent for path in sorted(self.path.rglob(RELEASED))]
        assert not any(list(path.glob("*.safetensors")) for path in found)
        return [path.relative_to(self.path).as_posix() for path in found]


def digests(run: Path) -> dict[str, str]:
    """Content digest of every artifact of a run, by place; each of them is as its manifest says."""
    found = {}
    for path in sorted(run.rglob(MANIFEST)):
        place = path.parent.relative_to(run)
        if not any(part.startswith(".") for part in place.parts):
            artifact = Artifact.open(path.parent)
            assert artifact.damage() == []
            found[place.as_posix()] = artifact.manifest.digest
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the logs of events and of the lock."""
    names = {"events.jsonl", "lock", RELEASED}  # the last holds the time
    return {
        path.relative_to(folder).as_posix(): b"" if path.name in names else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kept(run: Run, keep: str) -> dict[str, str | None]:
    return why_kept(run.path, run.graph, up_to_date(run.graph), keep)


# What goes, and what stays.


@pytest.mark.parametrize("value", ["some", "last", "last 0", "last -1", "last 2 3", "2", "Best"])
def test_other_policies_are_mistakes(smallest: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match='must be all, best, or "last N"'):
        load_run_config(smallest, [f"retention.keep={value}"])
    Run(smallest).drive(0)
    assert main(["gc", str(Run(smallest).path), "--keep", value]) == 2
    assert 'must be all, best, or "last N"' in capsys.readouterr().err


def test_what_each_policy_keeps(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(5)
    last = "the last policy, from which more iterations start"
    gone = {f"iteration-00{i}/training": None for i in (1, 3, 4)}
    rest = {"iteration-002/training": "the best so far", "iteration-005/training": last}
    assert kept(run, "best") == kept(run, "last 1") == gone | rest
    assert kept(run, "last 3") == {**gone, **rest} | dict.fromkeys(
        ["iteration-003/training", "iteration-004/training"], "keep=last 3"
    )
    assert set(kept(run, "all").values()) == {"keep=all"}
    assert set(kept(run, "last 9").values()) == {"keep=last 9", "the best so far", last}


def test_the_latest_average_stays(smallest: Path) -> None:
    run = Run(smallest, "reference=ema")
    run.drive(3)
    reasons = kept(run, "best")
    assert reasons["iteration-001/ema"] is reasons["iteration-002/ema"] is None
    assert reasons["iteration-003/ema"] == "the last average"
    assert kept(run, "last 2")["iteration-002/ema"] == "keep=last 2"


PPO = ("training.algorithm=ppo", "training.settings={}", "critic.start=policy")


def test_the_latest_critic_stays_and_those_before_go(smallest: Path) -> None:
    run = Run(smallest, *PPO)
    run.drive(3)
    reasons = kept(run, "best")
    assert reasons["iteration-001/critic"] is reasons["iteration-002/critic"] is None
    assert reasons["iteration-003/critic"] == "the last critic, from which more iterations start"
    assert "setup/critic" not in reasons
    assert kept(run, "last 2")["iteration-002/critic"] == "keep=last 2"
    shutil.rmtree(run.path / "iteration-002/values")
    assert kept(run, "best")["iteration-001/critic"] == "iteration-002/values still needs it"


def test_a_run_on_samples_with_retention_ends_like_one_without(smallest: Path) -> None:
    whole = Run(smallest, f"directory={smallest.parent / 'whole'}", *PPO)
    whole.drive(4)
    run = Run(smallest, "retention.keep=last 1", "retention.compress=true", *PPO)
    run.drive(2)
    assert run.released() == ["iteration-001/critic", "iteration-001/training"]
    run.drive(4)
    critics = [f"iteration-00{number}/critic" for number in (1, 2, 3)]
    assert run.released() == sorted([*critics, "iteration-001/training", "iteration-003/training"])
    assert run.digests() == whole.digests()
    assert list(run.path.glob("iteration-*/**/shard-*.jsonl")) == []
    assert run.drive(4) == []
    shutil.rmtree(run.path / "iteration-004/values")
    started = run.drive(4)
    assert started == [*critics, "iteration-004/values"]  # each critic starts from the one before
    assert run.digests() == whole.digests()


def test_a_fork_of_a_run_on_samples_goes_on_with_its_critic(smallest: Path) -> None:
    run = Run(smallest, "experience.kl_target=6", *PPO)
    run.drive(3)
    target, _ = fork(RunDirectory.existing(run.path), 3, ["experience.kl_coefficient=0.2"], None)
    forked = Run(target / CONFIG)
    started = forked.drive(3)
    assert "iteration-003/values" not in started
    assert {"iteration-003/experience", "iteration-003/critic", "iteration-003/training"} <= set(started)
    assert not any(name.startswith(("iteration-002", "iteration-001", "setup")) for name in started)
    config = forked.graph.nodes["iteration-003/experience"].config.model_dump()
    assert (config["previous"], config["kl_coefficient"]) == (None, 0.2)


def test_what_is_still_needed_stays(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(4)
    shutil.rmtree(run.path / "iteration-001/heldout/generation")
    assert kept(run, "last 1")["iteration-001/training"] == "iteration-001/heldout/generation still needs it"
    shutil.rmtree(run.path / "iteration-002/evaluation")
    assert kept(run, "best")["iteration-002/training"] == "not evaluated yet"
    # What was made from something else than what is there now has to run again, too.
    shutil.rmtree(run.path / "iteration-003/pairs")
    reasons = kept(run, "last 1")
    assert reasons["iteration-002/training"] == "iteration-003/training still needs it"
    assert "iteration-003/training" not in reasons  # it has to run again itself


def test_iterations_that_the_last_command_did_not_ask_for_count(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(4)
    run.drive(1)
    assert "release  iteration-001/training" in "\n".join(run.collect("last 1"))
    assert run.released() == ["iteration-001/training", "iteration-003/training"]


def other_run(run: Run, name: str, settings: dict[str, Any]) -> Path:
    other = run.path.parent / name
    other.mkdir()
    (other / "run.json").write_text(json.dumps({"config": "x", "iterations": 1, "settings": {}}))
    (other / "config.resolved.yaml").write_text(yaml.safe_dump(settings))
    return other


@pytest.mark.parametrize("spelling", ["absolute", "relative", "link"])
def test_what_another_run_names_in_its_config_stays(smallest: Path, spelling: str) -> None:
    run = Run(smallest)
    run.drive(4)
    path = run.path / "iteration-001/training"
    if spelling == "relative":
        path = path.relative_to(run.path.parents[1])
    elif spelling == "link":
        (run.path.parents[1] / "latest").symlink_to(run.path)
        path = run.path.parents[1] / "latest/iteration-001/training"
    other_run(run, "other", {"scorers": {"reward": {"model": str(path)}}})
    assert kept(run, "last 1")["iteration-001/training"] == "the run other reads it"
    assert kept(run, "last 1")["iteration-003/training"] is None


def test_what_another_run_has_read_stays(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(4)
    other = other_run(run, "other", {})
    shutil.copytree(run.path / "iteration-002/generation", other / "iteration-001/generation")
    assert kept(run, "last 1")["iteration-001/training"] == "the run other reads it"
    (other / "iteration-001/generation" / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="is damaged, so that its run's inputs are unknown"):
        kept(run, "last 1")


def test_a_fork_needs_nothing_of_where_it_comes_from(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(4)
    target, _ = fork(RunDirectory.existing(run.path), 3, ["training.settings.beta=0.3"], "child")
    assert kept(run, "last 1")["iteration-001/training"] is None
    lines = run.collect("last 1", pack=True)
    assert any(line.startswith("release  iteration-001/training  0.0 MB") for line in lines)
    assert any("another run shares it" in line for line in lines)
    assert digests(target)
    child = Run(target / CONFIG)
    started = child.drive(4)
    assert "iteration-003/training" in started
    assert not any(name.startswith(("iteration-001", "iteration-002", "setup")) for name in started)


def test_a_pinned_run_is_left_alone(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(smallest)
    run.drive(3)
    assert main(["pin", str(run.path)]) == 0
    before = contents(run.path)
    assert "is pinned" in run.collect("last 1", pack=True, superseded=True)[0]
    assert run.drive(3, "retention.keep=last 1", "retention.compress=true") == []
    assert "is pinned; nothing of it is deleted" in run.lines
    assert contents(run.path).keys() == before.keys()
    console = Console(file=io.StringIO(), width=200)
    print_status(console, RunDirectory.existing(run.path), run.graph)
    assert "nobody drives it, pinned" in console.file.getvalue()  # type: ignore[attr-defined]
    assert main(["pin", str(run.path), "--off"]) == 0
    run.drive(3, "retention.keep=last 1")
    assert run.released() == ["iteration-001/training"]


def test_gc_says_what_it_would_do_and_then_does_it(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(3)
    run.drive(3, "training.settings.beta=0.3")
    reference = run.digests()
    alive = run.graph.nodes["iteration-001/training"].output
    abandoned = partial_directory(alive, "0" * 64)
    going_on = partial_directory(run.path / "iteration-009/training", "0" * 64)
    for path in (abandoned, going_on):
        path.mkdir(parents=True)
        (path / "file").write_text("something")
    (run.path / ".trash-old").mkdir()
    before = contents(run.path)
    said = run.collect("last 1", pack=True, superseded=True, dry_run=True)
    assert contents(run.path) == before
    assert said[-1].endswith("Nothing was changed.")
    size = sum(map(len, before.values()))
    done = run.collect("last 1", pack=True, superseded=True)
    words = [(line.split()[0], line.split()[1]) for line in done[:-1]]
    assert words == [(line.split()[0], line.split()[1]) for line in said[:-1]]
    after = contents(run.path)
    freed = [event["bytes"] for event in run.events() if event["event"] == "gc"]
    assert sum(freed) == size - sum(map(len, after.values()))
    assert done[-1] == f"{sum(freed) / 1e6:.1f} MB were freed."
    assert ("delete", ".trash-old") in words
    assert ("delete", abandoned.relative_to(run.path).as_posix()) in words
    assert ("release", "iteration-001/training") in words
    assert ("keep", "iteration-002/training") in words
    assert ("compress", "iteration-001/generation") in words
    assert ("compress", "iteration-003/heldout/reward") in words
    assert not abandoned.exists()
    assert going_on.exists()
    assert not list(run.path.glob("superseded/**/manifest.json"))
    packed = {name.removesuffix(".gz") for name in after if name.endswith(".gz")}
    assert packed == {
        name
        for name in before
        if "iteration-" in name and "shard" in name and "pairs" not in name and "superseded" not in name
    }
    assert run.digests() == {name: value for name, value in reference.items() if "superseded" not in name}
    again = run.collect("last 1", pack=True, superseded=True)
    assert {line.split()[0] for line in again} == {"keep", "0.0"}
    assert run.drive(3, "training.settings.beta=0.3") == []


def test_without_asking_gc_keeps_what_it_could_delete_and_says_so(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(2)
    run.drive(2, "training.settings.beta=0.3")
    before = contents(run.path)
    lines = run.collect("all")
    assert {line.split()[0] for line in lines[:-1]} == {"keep"}
    assert any(line.startswith("keep     superseded") for line in lines)
    assert contents(run.path) == before


def test_gc_does_not_work_beside_a_driver(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(1)
    driver = RunDirectory(run.path)
    driver.lock()
    with pytest.raises(UserError, match="driven right now"):
        run.collect("last 1")


def test_damaged_rows_are_not_compressed(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(1)
    shard = run.path / "iteration-001/generation/shard-00001.jsonl"
    shard.write_bytes(b"{}\n")
    with pytest.raises(UserError, match="differs from the manifest, so that it was not compressed"):
        run.collect("all", pack=True)
    assert shard.read_bytes() == b"{}\n"
    assert run.drive(1, "retention.compress=true") == []
    assert "warning: compressing iteration-001/generation failed, and the run goes on: UserError" in run.lines
    failed = [event["what"] for event in run.events() if event["event"] == "retention failed"]
    assert failed == ["compressing iteration-001/generation"]
    assert (run.path / "iteration-001/reward/shard-00000.jsonl.gz").is_file()


def test_a_failure_of_retention_is_told_and_ends_no_run(smallest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    run = Run(smallest)
    monkeypatch.setattr("pipelines.run.retention.write_atomically", lambda path, _: fail(path))
    run.drive(3, "retention.keep=last 1")
    assert run.lines.count("warning: retention failed, and the run goes on: PermissionError") == 1
    assert run.released() == []


def test_a_released_model_of_another_run_is_told(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(3, "retention.keep=last 1")
    with pytest.raises(UserError, match="were deleted by `pipeline gc`"):
        ModelInfo.read(run.path / "iteration-001/training")


# While a driver works, and making again.


def test_a_run_with_retention_ends_like_one_without(smallest: Path) -> None:
    whole = Run(smallest, f"directory={smallest.parent / 'whole'}")
    whole.drive(5)
    run = Run(smallest, "retention.keep=last 1", "retention.compress=true")
    run.drive(2)
    assert run.released() == ["iteration-001/training"]
    run.drive(5)
    assert run.released() == ["iteration-001/training", "iteration-003/training", "iteration-004/training"]
    assert run.digests() == whole.digests()
    plain = [path for path in run.path.glob("iteration-*/**/shard-*.jsonl") if path.parent.name != "pairs"]
    assert plain == []
    assert run.drive(5) == []
    assert "run    " not in run.lines
    console = Console(file=io.StringIO(), width=200)
    print_status(console, RunDirectory.existing(run.path), run.graph)
    assert console.file.getvalue().count(" released ") == 3  # type: ignore[attr-defined]


def test_weights_go_as_soon_as_nobody_needs_them(smallest: Path) -> None:
    run = Run(smallest, "retention.keep=last 1")
    seen: list[int] = []

    def prepare(stages: Stages) -> None:
        stages.after = lambda: seen.append(len(list(run.path.glob("iteration-*/training/*.safetensors"))))

    run.drive(6, prepare=prepare)
    assert max(seen) == 3  # the best, the one that is being judged, and the next one


CHAIN = ["iteration-001/training", "iteration-003/training", "iteration-004/training"]


def released_chain(config: Path) -> tuple[Run, dict[str, str]]:
    """A run of five iterations without the weights of the first, third and fourth policy, and its digests."""
    run = Run(config)
    run.drive(5)
    reference = run.digests()
    run.collect("last 1", pack=True)
    assert run.released() == CHAIN
    return run, reference


def test_what_is_needed_again_is_made_again_with_what_that_needs(smallest: Path) -> None:
    run, reference = released_chain(smallest)
    shutil.rmtree(run.path / "iteration-004/heldout/generation")
    started = run.drive(5)
    # The fourth policy starts from the third one, which starts from the second, whose weights are there.
    assert started == ["iteration-003/training", "iteration-004/training", "iteration-004/heldout/generation"]
    because = "its weights were deleted by gc and"
    assert f"run    iteration-004/training  ({because} iteration-004/heldout/generation needs them)" in run.lines
    assert f"run    iteration-003/training  ({because} iteration-004/training needs them)" in run.lines
    assert max(int(done) for done in re.findall(r"\[(\d+)/", run.lines)) <= len(run.graph.nodes)
    assert run.digests() == reference
    assert run.released() == ["iteration-001/training"]
    assert not list(run.path.rglob(".*.released"))
    assert run.drive(5, "retention.keep=last 1") == []
    assert run.released() == CHAIN


def test_nothing_is_made_again_for_stages_that_are_reused(smallest: Path) -> None:
    run, reference = released_chain(smallest)
    started = run.drive(6)
    assert started
    assert not {*CHAIN, "setup/sft"}.intersection(started)
    assert reference.items() <= run.digests().items()


def test_a_dry_run_says_what_is_made_again(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = released_chain(smallest)
    arguments = ["run", str(smallest), "--iters", "5", "--dry-run"]
    assert main(arguments) == 0
    assert "run    " not in capsys.readouterr().out
    shutil.rmtree(run.path / "iteration-004/heldout/generation")
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    because = "its weights were deleted by gc and"
    assert f"run    iteration-004/training  ({because} iteration-004/heldout/generation needs them)" in lines
    assert f"run    iteration-003/training  ({because} iteration-004/training needs them)" in lines
    assert not any(line.startswith("run    iteration-001") for line in lines)


def test_where_it_comes_out_differently_all_that_was_made_from_it_is_made_again(smallest: Path) -> None:
    run, reference = released_chain(smallest)
    shutil.rmtree(run.path / "iteration-004/heldout/generation")

    def prepare(stages: Stages) -> None:
        stages.salt = "as on a GPU"

    started = run.drive(5, prepare=prepare)
    assert "iteration-003/training differs from what it was before its weights were deleted" in run.lines
    assert {"iteration-004/generation", "iteration-005/training", "iteration-005/evaluation"} <= set(started)
    assert not any(name.startswith(("iteration-001", "iteration-002", "setup")) for name in started)
    assert up_to_date(run.graph) == set(run.graph.nodes)
    changed = {name for name, value in run.digests().items() if "superseded" not in name and reference[name] != value}
    assert "iteration-005/training" in changed
    assert run.drive(5) == []


# Killed.


@pytest.mark.chaos
def test_deleting_and_compressing_killed_at_every_step_lose_nothing(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(1)
    artifacts = [Artifact.open(run.path / "iteration-001" / name) for name in ("training", "generation")]

    def work() -> None:
        release(artifacts[0], "a reason")
        compress(artifacts[1])

    template, folder = smallest.parent / "template", run.path / "iteration-001"
    shutil.copytree(folder, template)
    work()
    expected = contents(folder)
    assert artifacts[0].released == {"model.safetensors"}
    number, reached = 0, True
    while reached:
        shutil.rmtree(folder)
        shutil.copytree(template, folder)
        number += 1
        reached = is_killed_at(number, work)
        assert [problem for artifact in artifacts for problem in artifact.damage()] == []
        work()
        assert contents(folder) == expected, f"killed at step {number}"
    assert number > 15


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_gc_killed_at_any_step_loses_nothing_and_ends_the_same(smallest: Path) -> None:
    run = Run(smallest)
    run.drive(2)
    run.drive(2, "training.settings.beta=0.3")  # something for superseded/
    partial = run.path / "iteration-001/.pairs.partial-0"
    partial.mkdir()
    (partial / "file").write_text("something")
    assert kept(run, "last 1")["iteration-001/training"] is None
    reference = {name: value for name, value in run.digests().items() if not name.startswith("superseded")}
    template = smallest.parent / "template"
    shutil.copytree(run.path, template)

    def clean() -> None:
        run.collect("last 1", pack=True, superseded=True)

    clean()
    expected = contents(run.path)
    number = 1
    reached = True
    while reached:
        shutil.rmtree(run.path)
        shutil.copytree(template, run.path)
        reached = is_killed_at(number, clean)
        assert reference.items() <= run.digests().items()
        clean()
        assert contents(run.path).keys() == expected.keys(), f"killed at step {number}"
        assert contents(run.path) == expected, f"killed at step {number}"
        number += 17  # all of them took minutes, and found nothing


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_a_driver_killed_while_it_makes_again_loses_nothing(smallest: Path) -> None:
    run, reference = released_chain(smallest)
    shutil.rmtree(run.path / "iteration-004/heldout/generation")
    template = smallest.parent / "template"
    shutil.copytree(run.path, template)
    number = 1
    reached = True
    while reached:
        shutil.rmtree(run.path)
        shutil.copytree(template, run.path)
        reached = is_killed_at(
            number, lambda: run.drive(5), [(os, name) for name in ("rename", "unlink", "rmdir", "mkdir")]
        )
        there = {path.parent for path in run.path.rglob(MANIFEST)}
        for name in reference.keys() - {"iteration-004/heldout/generation"}:
            path = run.path / name
            assert path in there or any(path.is_relative_to(run.path / "superseded" / name) for path in there)
        run.drive(5)
        assert run.digests() == reference
        assert not list(run.path.rglob(".*"))
        assert run.drive(5) == []
        number += 7


# Real stages.


def pipeline(*arguments: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "pipelines", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.timeout(900)
def test_a_real_run_with_retention_ends_like_one_without(finished_run: FinishedRun, tmp_path: Path) -> None:
    run = tmp_path / "smallest"
    shutil.copytree(finished_run.path, run, ignore=shutil.ignore_patterns("iteration-002"))
    reference = digests(finished_run.path)
    command = ["run", str(finished_run.config), f"directory={tmp_path}", "retention.keep=last 1"]
    command += ["retention.compress=true"]
    pipeline(*command, "--iters", "1")
    pipeline("gc", str(run))
    assert not list(run.glob("iteration-*/generation/*.jsonl"))
    pipeline(*command, "--iters", "2")
    assert digests(run) == reference
    gone = [path.parent for path in sorted(run.rglob(RELEASED))]
    assert gone  # the last is kept, and the best, which is the initial policy
    for path in gone:
        assert not list(path.glob("*.safetensors"))
    judged = f"{gone[0].parent.name}/heldout/generation"
    lines = pipeline(*command, "--iters", "2", "--force", judged)
    assert f"its weights were deleted by gc and {judged} needs them" in lines
    assert f"forced {judged}: the same content" in lines
    shutil.rmtree(run / "superseded")
    assert digests(run) == reference
    assert [path.parent for path in sorted(run.rglob(RELEASED))] == gone
    assert "is finished" in pipeline(*command, "--iters", "2")
