"""Streaming: a scorer that takes the shards of a generation as they are finished, while the generation still runs.

The stages pretend to work (pretend.py); what they publish is compared with a run in which nothing is streamed.
"""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from pipelines_slurm_run import digests as run_digests
from pipelines_smallest import pipeline, write_pretended, write_smallest
from pretend import SHARDS, set_seconds, write_interpreter

import pipelines.execution.driver
from annotation.stages.pairs import CHOOSE_PAIRS
from annotation.stages.score import SCORE
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fingerprint import file_sha256
from contracts.following import Producer
from contracts.jsonl import read_jsonl, write_jsonl
from contracts.manifest import MANIFEST, Manifest
from contracts.points import KEY_LENGTH, REPORTS, Report, read_points
from contracts.processes import kill, pids_with_variable
from contracts.publication import finished_in, receipt_in
from contracts.records import Rollout, Score
from contracts.stages.prompts import IMPORT_PROMPTS
from generation.stages.generation import GENERATION
from pipelines.config.load import load_run_config
from pipelines.execution.attempts import StageFailedError
from pipelines.execution.driver import Driver, Running
from pipelines.execution.executors.base import Executors, Site
from pipelines.graph import Graph, Node, Placement
from pipelines.insight.metrics_collector import Collector
from pipelines.job import ENTRY
from pipelines.planning.cluster import cluster_of
from pipelines.planning.placement import place
from pipelines.run.decisions import Decision
from pipelines.run.directory import RunDirectory
from pipelines.run.events import FILE, Event, StageFailed, StagePublished, StageReused, StageStarted
from pipelines.run.force import set_aside
from pipelines.run.verdicts import Verdict
from training.stages.value_head import VALUE_HEAD

FIRST = "shard-00000.jsonl"
SECONDS = 200.0
"""No step of a test takes longer."""
KILLS = 30
MARK = "PRETENDED_RUN"
"""Environment variable of every process of a run that is killed."""


class Scene:
    """A run of prompts, a generation and a scorer of its answers."""

    def __init__(self, folder: Path, smallest: Path, *overrides: str, **acts: list[str]) -> None:
        self.folder = folder / "interpreter"
        python = self.folder / "python" if self.folder.exists() else write_interpreter(self.folder, **acts)
        self.policy = folder / "policy"
        self.policy.mkdir(exist_ok=True)
        (self.policy / "notes.txt").write_text("of no weight")
        (folder / "prompts.jsonl").write_text('{"prompt": "so?"}\n')
        environments = [f"environments.{name}.python={python}" for name in ("generation", "annotation")]
        settings = [
            "executor.backoff_seconds=0.05",
            "executor.grace_seconds=1",
            "executor.parallel=2",
            "placement.streaming=true",
            *overrides,
        ]
        self.config = load_run_config(smallest, [*environments, *settings])
        self.run = RunDirectory(self.config.run_directory)
        self.run.claim(self.config, smallest, 0)
        graph = Graph(self.run.path)
        prompts = graph.add(IMPORT_PROMPTS, "prompts", {"source": folder / "prompts.jsonl"})
        self.rollouts = graph.add(GENERATION, "generation", {"policy": self.policy, "prompts": prompts})
        fields = {"rollouts": self.rollouts, "kind": "rule", "function": "embedded.reviews:well_formed"}
        self.scores = graph.add(SCORE, "reward", fields)
        self.graph = place(graph, cluster_of(self.config))

    def drive(self, meanwhile: Callable[["Scene"], None] = lambda scene: None) -> None:
        """Run to the end, and do something at the same time."""
        errors: list[BaseException] = []

        def act() -> None:
            try:
                meanwhile(self)
            except BaseException as error:
                errors.append(error)
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=act)
        thread.start()
        try:
            Driver(Site(self.run, self.graph, self.config, ENTRY), []).drive()
        except KeyboardInterrupt:
            if not errors:
                raise
        finally:
            thread.join()
        if errors:
            raise errors[0]

    def release(self, stage: str) -> None:
        """Let a stage that waits go on."""
        (self.folder / f"release-{stage}").touch()

    def hidden(self, output: Path) -> Path | None:
        """The hidden directory of an output, if it is there."""
        return next(output.parent.glob(f".{output.name}.partial-*"), None)

    def finished(self, output: Path) -> list[str]:
        """The shards of an output that have receipts, while it is made."""
        hidden = self.hidden(output)
        return [] if hidden is None else finished_in(hidden)

    def wait_for(self, output: Path, shards: int) -> None:
        """Until so many shards of an output are finished, which is not published."""
        wait(lambda: len(self.finished(output)) == shards, f"{shards} shards of {output.name}")
        assert not (output / MANIFEST).exists()

    def events(self, kind: type[Event], stage: str) -> list[Any]:
        return [event for event in self.run.events() if isinstance(event, kind) and event.stage == stage]  # type: ignore[attr-defined]

    def log(self, stage: str, attempt: int) -> str:
        return (self.run.path / "logs" / stage / f"attempt-{attempt}" / "stage.log").read_text()


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def release_when_followed(scene: Scene) -> None:
    """The generation waits after its first shard until it has been scored."""
    scene.wait_for(scene.scores, 1)
    assert scene.finished(scene.rollouts) == [FIRST]
    scene.release("generation")


def without_times(manifest: Manifest) -> dict[str, Any]:
    data = msgspec.to_builtins(manifest)
    for name in ("seconds", "created", "checksum", "input_paths", "hardware"):
        del data[name]
    return data


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The same, without streaming."""
    folder = tmp_path_factory.mktemp("plain")
    scene = Scene(folder, write_smallest(folder), "placement.streaming=false")
    scene.drive()
    return scene


def test_a_scorer_follows_a_generation_and_publishes_the_same(tmp_path: Path, smallest: Path, plain: Scene) -> None:
    scene = Scene(tmp_path, smallest, generation=["wait after 1"])
    scene.drive(release_when_followed)
    for output, other in ((scene.rollouts, plain.rollouts), (scene.scores, plain.scores)):
        made, wanted = Artifact.open(output), Artifact.open(other)
        assert made.damage() == []
        assert without_times(made.manifest) == without_times(wanted.manifest)
        assert list(without_times(made.manifest)["inputs"]) == list(without_times(wanted.manifest)["inputs"])
    assert Artifact.open(scene.scores).manifest.seconds["wait"] > 0
    assert "wait" not in Artifact.open(plain.scores).manifest.seconds
    (started,) = scene.events(StageStarted, "reward")
    (published,) = scene.events(StagePublished, "reward")
    assert started.reason == "follows generation"
    assert published.key == Artifact.open(scene.scores).manifest.key
    assert [event.reason for event in plain.events(StageStarted, "reward")] == ["not made yet"]
    assert not list(scene.run.path.glob(".*.partial-*"))


def test_whoever_is_killed_goes_on_with_its_finished_shards(tmp_path: Path, smallest: Path, plain: Scene) -> None:
    """The generation after its first shard, the scorer after that one too, and both once more."""
    acts = ["kill after 1", "wait after 1"]
    scene = Scene(tmp_path, smallest, generation=acts, reward=["kill after 1"])
    first: list[int] = []

    def meanwhile(scene: Scene) -> None:
        scene.wait_for(scene.scores, 1)
        hidden = scene.hidden(scene.scores)
        assert hidden is not None
        first.append((hidden / FIRST).stat().st_ino)
        wait(lambda: len(scene.events(StageStarted, "reward")) == 2, "the scorer starts again")
        wait(lambda: len(scene.finished(scene.rollouts)) == 2, "the generation goes on")
        scene.release("generation")

    scene.drive(meanwhile)
    assert len(scene.events(StageFailed, "generation")) == 1
    assert [event.how[:20] for event in scene.events(StageFailed, "reward")] == ["was killed by SIGKIL"]
    assert digests(scene) == digests(plain)
    assert (scene.scores / FIRST).stat().st_ino in first
    for number in (1, 2):  # the first attempt has told of its shard before it was killed, the second once more
        report = Report("shard", 0, float(number), {"score_mean": 0.5})
        reports = scene.run.path / "logs/reward" / f"attempt-{number}" / REPORTS.replace("*", "one")
        reports.write_bytes(msgspec.json.encode(report) + b"\n")
    collector = Collector(scene.run, scene.graph)
    collector.finish("reward")
    collector.finish("reward")
    points = [(point.unit, point.key) for point in read_points(scene.run.path)]
    assert sorted(points) == [
        (unit, Artifact.open(scene.scores).manifest.key[:KEY_LENGTH]) for unit in ("shard", "stage")
    ]
    assert not list(scene.run.path.glob(".*.partial-*"))


@pytest.mark.slow
def test_a_scorer_that_is_killed_at_the_end_goes_on_with_what_is_published(
    tmp_path: Path, smallest: Path, plain: Scene
) -> None:
    scene = Scene(tmp_path, smallest, generation=["wait after 1"], reward=["kill after 2"])
    scene.drive(release_when_followed)
    assert len(scene.events(StageStarted, "reward")) == 2
    assert digests(scene) == digests(plain)


@pytest.mark.slow
def test_where_the_generation_fails_nothing_is_published_and_the_next_command_goes_on(
    tmp_path: Path, smallest: Path, plain: Scene
) -> None:
    scene = Scene(tmp_path, smallest, generation=["exit 3 after 2"])
    with pytest.raises(StageFailedError, match="stage generation failed with exit code 3"):
        scene.drive()
    assert not (scene.scores / MANIFEST).exists()
    assert scene.finished(scene.rollouts) == [FIRST, "shard-00001.jsonl"]
    kept = scene.finished(scene.scores)
    scene.drive()
    assert digests(scene) == digests(plain)
    reason = scene.events(StageStarted, "reward")[-1].reason
    assert reason in ("continues where it was interrupted", "follows generation") or not kept


def test_a_shard_that_was_made_from_other_rows_than_are_published_is_made_again(tmp_path: Path, smallest: Path) -> None:
    """As where a graphics card has sampled other answers after a crash."""
    scene = Scene(tmp_path, smallest, generation=["wait after 1"])

    def meanwhile(scene: Scene) -> None:
        scene.wait_for(scene.scores, 1)
        resample(scene, "another")
        scene.release("generation")

    scene.drive(meanwhile)
    rollouts, scores = Artifact.open(scene.rollouts), Artifact.open(scene.scores)
    names = {row.prompt_id for row in rollouts.rows(Rollout)}
    assert "another" in names
    assert {row.prompt_id for row in scores.rows(Score)} == names
    assert scores.manifest.inputs["rollouts"] == rollouts.manifest.digest
    assert "1 shards were computed from a different input, and are recomputed: shard-00000" in scene.log("reward", 1)


def resample(scene: Scene, prompt_id: str) -> None:
    """Have another first shard in the hidden directory of the generation, finished as well."""
    hidden = scene.hidden(scene.rollouts)
    assert hidden is not None
    (row,) = read_jsonl(hidden / FIRST, Rollout)
    write_jsonl(hidden / FIRST, [msgspec.structs.replace(row, prompt_id=prompt_id)])
    receipt = receipt_in(hidden, FIRST) or json.loads((hidden / f".receipt-{FIRST}.json").read_text())
    data = msgspec.to_builtins(receipt)
    data["file"] |= {"sha256": file_sha256(hidden / FIRST), "bytes": (hidden / FIRST).stat().st_size}
    (hidden / f".receipt-{FIRST}.json").write_bytes(msgspec.json.encode(data))


@pytest.mark.slow
def test_an_interrupted_command_goes_on_with_or_without_streaming(tmp_path: Path, smallest: Path, plain: Scene) -> None:
    scene = Scene(tmp_path, smallest, generation=["wait after 1", "wait after 1"])

    def interrupt(scene: Scene) -> None:
        scene.wait_for(scene.scores, 1)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        scene.drive(interrupt)
    scene.config = scene.config.model_copy(
        update={"placement": scene.config.placement.model_copy(update={"streaming": False})}
    )
    scene.release("generation")
    scene.drive()
    assert [event.reason for event in scene.events(StageStarted, "reward")] == [
        "follows generation",
        "continues where it was interrupted",
    ]
    assert digests(scene) == digests(plain)
    assert "wait" not in scene.log("reward", 2)


@pytest.mark.slow
def test_without_room_for_both_nothing_starts_early(tmp_path: Path, smallest: Path) -> None:
    scene = Scene(tmp_path, smallest, "executor.parallel=1")
    scene.drive()
    assert [event.reason for event in scene.events(StageStarted, "reward")] == ["not made yet"]


@pytest.mark.slow
def test_a_forced_generation_is_not_followed_because_its_scores_may_be_reused(tmp_path: Path, smallest: Path) -> None:
    scene = Scene(tmp_path, smallest)
    scene.drive()
    set_aside(scene.run.path, scene.graph, ["generation"])
    scene.drive()
    assert len(scene.events(StageStarted, "generation")) == 2
    assert len(scene.events(StageStarted, "reward")) == 1


@pytest.mark.slow
def test_what_could_have_been_taken_back_is_dropped_for_what_was_made_meanwhile(tmp_path: Path, smallest: Path) -> None:
    """Another policy that samples the same answers: that the scores are there already is known too late."""
    scene = Scene(tmp_path, smallest)
    scene.drive()
    before = Artifact.open(scene.scores).manifest
    (scene.policy / "notes.txt").write_text("of as little")
    (scene.folder / "acts.json").write_text(json.dumps({"generation": ["wait after 1"]}))
    scene.drive(release_when_followed)
    after = Artifact.open(scene.scores).manifest
    assert (after.key, after.digest) == (before.key, before.digest)
    assert after.created != before.created
    assert not list((scene.run.path / "superseded" / "reward").glob("*"))
    scene.drive()
    assert len(scene.events(StageStarted, "reward")) == 2
    assert not scene.events(StageReused, "reward")


def test_what_a_driver_killed_after_a_stage_has_not_cleaned_up_is_cleaned_by_the_next(
    tmp_path: Path, smallest: Path, plain: Scene
) -> None:
    """It had no time to record that the scores are published, nor to delete what an attempt has left."""
    scene = Scene(tmp_path, smallest, "placement.streaming=false")
    scene.drive()
    events = scene.run.path / FILE
    published = scene.events(StagePublished, "reward")[0].key
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join(line for line in lines if published.encode() not in line))
    left = scene.scores.parent / f".{scene.scores.name}.partial-0123456789abcdef"
    left.mkdir()
    scene.drive()
    assert [event.key for event in scene.events(StageReused, "reward")] == [published]
    assert not left.exists()
    assert digests(scene) == digests(plain)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"placement\.streaming is true.*takes a driver"),
        (["placement.streaming=false"], "stage reward runs on the executor local, which needs a process that stays"),
    ],
)
def test_a_detached_run_is_refused(overrides: list[str], message: str, tmp_path: Path, smallest: Path) -> None:
    scene = Scene(tmp_path, smallest, *overrides)
    plan = {name: Verdict(name != "reward", "") for name in scene.graph.nodes}
    with pytest.raises(UserError, match=message):
        Executors(Site(scene.run, scene.graph, scene.config, ENTRY)).require_detachable(plan)


def digests(scene: Scene) -> list[tuple[str, str]]:
    """Key and digest of both artifacts; of a policy of the same content, so they are the same in every run."""
    assert sum(1 for _ in Artifact.open(scene.scores).rows(Score)) == SHARDS
    manifests = [Artifact.open(output).manifest for output in (scene.rollouts, scene.scores)]
    return [(manifest.key, manifest.digest) for manifest in manifests]


def test_what_a_follower_waits_for_gets_its_devices_before_more_urgent_stages(
    tmp_path: Path, smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generation was killed while its scorer waits on another device, and a stage that takes both is ready."""
    scene = Scene(tmp_path, smallest)
    graph = Graph(scene.run.path)
    prompts = graph.add(IMPORT_PROMPTS, "prompts", {"source": tmp_path / "prompts.jsonl"})
    fields = {"policy": scene.policy, "prompts": prompts}
    rule = {"kind": "rule", "function": "embedded.reviews:well_formed"}
    graph.add(SCORE, "reward", {"rollouts": graph.add(GENERATION, "generation", fields), **rule})
    urgent = graph.add(GENERATION, "urgent", {**fields, "seed": 1})
    more = graph.add(SCORE, "more", {"rollouts": urgent, **rule})
    graph.add(CHOOSE_PAIRS, "pairs", {"rollouts": urgent, "scores": more})
    devices = {"generation": (0,), "reward": (1,)}
    graph = graph.with_nodes(
        {
            name: replace(node, placement=Placement("local", devices.get(name, (0, 1)), exclusive=True))
            for name, node in graph.nodes.items()
        }
    )
    driver = Driver(Site(scene.run, graph, scene.config, ENTRY), [])
    order = [node.name for node in driver.order]
    assert order.index("urgent") < order.index("generation")
    driver.published.add("prompts")

    def start(node: Node, follows: dict[str, Producer]) -> None:
        decision = Decision(False, "", "0" * 64, "0" * 64, follows)
        driver.running[node.name] = Running(node, tmp_path, None, decision)  # type: ignore[arg-type]

    monkeypatch.setattr(driver, "reuse_or_start", lambda node: start(node, {}))
    driver.start_ready()
    assert list(driver.running) == ["urgent"]
    driver.running.clear()
    start(graph.nodes["reward"], {str(scene.rollouts): Producer("1", "1")})
    driver.start_ready()
    assert list(driver.running) == ["reward", "generation"]


class Ended:
    """A job that has nothing more to do."""

    pid: int | None = None

    def ended(self) -> bool:
        return True


def test_what_follows_waits_for_its_other_inputs_and_ends_after_its_maker(
    tmp_path: Path, smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, smallest)
    graph = Graph(scene.run.path)
    prompts = graph.add(IMPORT_PROMPTS, "prompts", {"source": tmp_path / "prompts.jsonl"})
    answers = graph.add(GENERATION, "generation", {"policy": scene.policy, "prompts": prompts})
    graph.add(SCORE, "reward", {"rollouts": answers, "kind": "rule", "function": "embedded.reviews:well_formed"})
    critic = graph.add(VALUE_HEAD, "critic", {"model": scene.policy})
    graph.add(SCORE, "values", {"rollouts": answers, "kind": "values", "name": "values", "model": critic})
    driver = Driver(Site(scene.run, place(graph, cluster_of(scene.config)), scene.config, ENTRY), [])
    monkeypatch.setattr(pipelines.execution.driver, "has_begun", lambda attempt: True)

    def at_work(name: str, follows: dict[str, Producer]) -> Running:
        decision = Decision(False, "", "0" * 64, "0" * 64, follows)
        return Running(graph.nodes[name], tmp_path, Ended(), decision)  # type: ignore[arg-type]

    driver.published = {"prompts"}
    assert driver.maker_to_follow(graph.nodes["reward"]) is None, "nobody makes the answers"
    driver.running["generation"] = maker = at_work("generation", {})
    assert driver.maker_to_follow(graph.nodes["reward"]) is maker
    assert driver.maker_to_follow(graph.nodes["values"]) is None, "the critic is not there"
    driver.published.add("critic")
    assert driver.maker_to_follow(graph.nodes["values"]) is maker

    reward = graph.nodes["reward"]
    reward.output.mkdir()
    (reward.output / MANIFEST).touch()
    driver.running = {"reward": at_work("reward", {str(answers): Producer("1", "1")})}
    driver.collect_ended()
    assert list(driver.running) == ["reward"], "its maker's turn comes first"


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"training": {"settings": {"beta": 0.3}}}, False),
        pytest.param({"generation": {"top_p": 0.9}}, True, marks=pytest.mark.slow),
    ],
    ids=["the same responses", "other responses"],
)
def test_a_rollback_ends_a_scorer_that_follows_a_generation(
    changes: dict[str, Any], fails: bool, tmp_path: Path
) -> None:
    """With a lag, the next iteration's generation may run when a gate rolls back, and its scorer may follow it. Whether
    the generation then publishes or is killed, the run ends as one without streaming."""
    generation, reward, gate = (f"iteration-00{name}" for name in ("2/generation", "2/reward", "1/gate"))
    gates = {"back": {"metric": "reward_mean", "above": 0.4, "do": "rollback", "at_most": 9, "changes": changes}}

    def configured(folder: Path, *, streaming: bool, **acts: list[str]) -> tuple[Path, Path]:
        folder.mkdir()
        path = write_pretended(folder, executor={"parallel": 4}, **acts)
        config = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**config, "lag": 1, "gates": gates, "placement": {"streaming": streaming}}))
        return path, folder / "runs" / "pretended"

    path, run = configured(
        tmp_path / "streamed", streaming=True, iteration_001__gate=["wait"], iteration_002__generation=["wait after 1"]
    )  # fmt: skip

    def events(kind: type[Event], stage: str) -> list[Any]:
        return [event for event in RunDirectory(run).events() if isinstance(event, kind) and event.stage == stage]  # type: ignore[attr-defined]

    def release(stage: str) -> None:
        (path.parent / "interpreter" / f"release-{stage.replace('/', '-')}").touch()

    with ThreadPoolExecutor(1) as pool:
        command = pool.submit(pipeline, "run", str(path), "--iters", "2", env={**os.environ, MARK: str(tmp_path)})
        try:
            wait(lambda: any(map(finished_in, (run / reward).parent.glob(".reward.partial-*"))), "the first scores")
            assert not (run / generation / MANIFEST).exists()
            release(gate)
            wait(lambda: events(StageFailed, reward), "the scorer is ended")
            assert not (run / generation / MANIFEST).exists(), "it still waits"
            for pid in pids_with_variable(f"{MARK}={tmp_path}") if fails else ():
                with contextlib.suppress(OSError):  # it has ended
                    if f"{generation}/attempt-1" in (Path("/proc") / str(pid) / "cmdline").read_text():
                        kill(pid, signal.SIGKILL)
        finally:
            release(gate)
            release(generation)
        result = command.result()
    assert result.returncode == 0, result.stderr
    assert [event.kind for event in events(StageFailed, reward)] == ["stopped"]
    plain_path, plain_run = configured(tmp_path / "plain", streaming=False)
    result = pipeline("run", str(plain_path), "--iters", "2")
    assert result.returncode == 0, result.stderr
    assert run_digests(run) == run_digests(plain_run)
    assert not [part for part in run.rglob("*") if ".partial-" in part.name]


def start_driver(folder: Path, smallest: Path, log: Path) -> int:
    """Drive a scene in a fork of this process, and return its id: nothing is to be imported before it can be killed."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ[MARK] = str(folder)
        Scene(folder, smallest, "executor.retries=1000").drive()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended_within(pid: int, seconds: float) -> bool:
    """Whether a process ends in that time."""
    handle = os.pidfd_open(pid)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


@pytest.mark.chaos
def test_kills_at_any_instant(tmp_path: Path, plain: Scene) -> None:
    """SIGKILL to a driver, a supervisor or a stage, in one run after another, until there were enough."""
    chance = random.Random(0)
    kills, followed = 0, 0
    while kills < KILLS:
        folder = tmp_path / "round"
        folder.mkdir()
        config = write_smallest(folder)
        set_seconds(Scene(folder, config).folder, {"generation": 1.5, "reward": 0.5})
        ended, longest = -signal.SIGKILL, 3.5
        while ended:
            driver = start_driver(folder, config, tmp_path / "drivers.log")
            longest *= 1.05  # on a machine that does much else, nothing would ever be finished
            while not ended_within(driver, chance.uniform(0.05, longest)):
                kill(chance.choice([driver, *pids_with_variable(f"{MARK}={folder}")]), signal.SIGKILL)
                kills += 1
            ended = os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1])
            assert ended in (0, -signal.SIGKILL), (tmp_path / "drivers.log").read_text()[-3000:]
        scene = Scene(folder, config)
        assert digests(scene) == digests(plain)
        assert not [path for path in scene.run.path.rglob("*") if ".partial-" in path.name or path.suffix == ".tmp"]
        followed += sum(event.reason == "follows generation" for event in scene.events(StageStarted, "reward"))
        shutil.rmtree(folder)
    assert followed > 0
