"""Shards that several processes share: tasks on any machines, and the publisher that comes after them."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import test_contracts_store_model
from forked import Forked
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from test_contracts_store_model import SHARED, WordsConfig, Writer, seen_at, strays, whole_digests

from contracts import files, stopping
from contracts.artifacts import Artifact
from contracts.errors import TransientError, UserError
from contracts.publication import Publication
from contracts.records import PROMPTS
from contracts.stage import Context, run_stage
from contracts.workers import share_shards


class Process(Forked):
    """A process that runs shared_stage."""

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        outputs = (self._file.fileno(), self._file.fileno())
        super().__init__("shared_stage", *arguments, env=environment, cwd=folder, outputs=outputs)

    def output(self) -> str:
        """What it has printed so far."""
        return os.pread(self._file.fileno(), 1 << 20, 0).decode()


class World:
    """Starts the stage in its roles, all with the same output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "out"
        self.log = folder / "log"

    def start(self, role: str | None, rank: int = 0, **settings: object) -> "Process":
        """One process; of a task, `rank` is its number from 1 on."""
        attempt = settings.pop("attempt", None)
        environment = dict(os.environ)
        if role is not None:
            environment["RATCHET_ROLE"] = role
        if role == "task":
            environment.update({"RANK": str(rank), "WORLD_SIZE": "100"})
        if attempt is not None:
            environment["RATCHET_ATTEMPT"] = str(attempt)
        settings.setdefault("output", self.output)
        return Process([f"{name}={value}" for name, value in settings.items()], environment, self.folder)

    def run(self, role: str | None, rank: int = 0, code: int = 0, **settings: object) -> str:
        """The output of one process, which must end with this code."""
        process = self.start(role, rank, **settings)
        process.wait(200)
        assert process.returncode == code, process.output()
        return process.output()

    def noted(self, word: str) -> list[str]:
        """What the stage has noted so far: begins, made (a shard's name), engine (a rank)."""
        lines = [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [line[-1] if line[1:] != ["engine"] else line[0] for line in lines if line[1] == word]

    def wait_for(self, word: str, count: int = 1) -> None:
        """Until the stage has noted something so often."""
        deadline = time.monotonic() + 200
        while len(self.noted(word)) < count:
            assert time.monotonic() < deadline, self.log.read_text() if self.log.exists() else "nothing noted"
            time.sleep(0.01)

    def go(self) -> None:
        """Have the shards that are held made."""
        (self.folder / "go").touch()

    @property
    def hidden(self) -> Path:
        (found,) = self.folder.glob(".out.partial-*")
        return found

    def alone(self, **settings: object) -> Artifact:
        """What one process makes of the same config."""
        output = self.folder / "alone" / "out"
        self.run(None, output=output, **settings)
        return Artifact.open(output, PROMPTS)

    def published(self) -> Artifact:
        """What is published, and nothing beside it."""
        assert not list(self.folder.glob(".out*"))
        artifact = Artifact.open(self.output, PROMPTS)
        assert artifact.damage() == []
        assert set(os.listdir(self.output)) == {"manifest.json", *(file.path for file in artifact.manifest.files)}
        return artifact


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.slow
def test_sixteen_tasks_at_once_and_then_a_publisher(world: World) -> None:
    tasks = [world.start("task", rank, shards=40, held=0) for rank in range(1, 17)]
    world.wait_for("engine", 2)
    world.go()
    for task in tasks:
        assert task.wait(120) == 0, task.output()
    assert not world.output.exists(), "a task never publishes"
    assert sorted(world.noted("made")) == [f"shard-{number:05d}.jsonl" for number in range(40)]
    assert len(set(world.noted("engine"))) > 1
    engines = len(world.noted("engine"))

    world.run("publisher", shards=40)
    assert len(world.noted("engine")) == engines, "a publisher loads nothing"
    one, found = world.alone(shards=40).manifest, world.published().manifest
    assert (found.digest, found.key, found.facts, found.weights) == (one.digest, one.key, one.facts, one.weights)
    assert found.ledger == one.ledger


def test_a_publisher_names_the_shards_that_are_missing(world: World) -> None:
    task = world.start("task", 1, shards=6, held=3)
    world.wait_for("begins", 4)
    task.kill()
    task.wait()
    finished = len(list(world.hidden.glob(".receipt-*.json")))
    attempt = world.folder / "attempt"
    attempt.mkdir()
    out = world.run("publisher", code=1, shards=6, attempt=attempt)
    (failure,) = (json.loads(path.read_bytes()) for path in attempt.glob("failure-*.json"))
    assert failure["kind"] == "transient"
    assert f"{6 - finished} of 6 shards are missing: shard-{finished:05d}.jsonl" in failure["text"]
    assert failure["text"] in out
    assert "Traceback" not in out
    assert not world.output.exists()

    engines = len(world.noted("engine"))
    world.go()
    world.run("task", 1, shards=6)
    world.run("task", 2, shards=6)
    assert len(world.noted("engine")) == engines + 1, "with nothing to make, no engine is loaded"
    world.run("publisher", shards=6)
    assert world.published().manifest.digest == world.alone(shards=6).manifest.digest
    made = Counter(world.noted("made"))
    assert max(made.values()) == 1


def test_a_publisher_waits_for_a_task_that_still_works(world: World) -> None:
    task = world.start("task", 1, shards=2, held=0)
    world.wait_for("begins")
    assert "another process is making" in world.run("publisher", code=2, shards=2)  # by hand: told at once
    attempt = world.folder / "attempt"
    attempt.mkdir()
    publisher = world.start("publisher", shards=2, attempt=attempt)
    deadline = time.monotonic() + 200
    while "waiting up to 120 s" not in publisher.output():
        assert time.monotonic() < deadline, publisher.output()
        time.sleep(0.01)
    world.go()
    assert publisher.wait(200) == 0, publisher.output()
    assert publisher.output().count("waiting up to 120 s") == 1
    assert task.wait(200) == 0
    assert world.published().manifest.rows == 2


def test_patience_runs_out(tmp_path: Path) -> None:
    holder = Publication(tmp_path / "out", PROMPTS, "prompts", "k" * 64)
    holder.begin()
    for enter in (Publication.begin, Publication.join):
        with pytest.raises(TransientError, match=r"for the 0.2 s that this one waited for the lock .*\.lock"):
            enter(Publication(tmp_path / "out", PROMPTS, "prompts", "k" * 64), 0.2)


def test_a_lone_task_clears_what_a_crash_left_and_another_one_leaves_it_alone(world: World) -> None:
    world.run("task", 1, shards=4)
    for name in ("shard-00001.jsonl", ".receipt-shard-00002.jsonl.json"):
        (world.hidden / name).write_bytes((world.hidden / name).read_bytes()[:-5])  # torn
    (world.hidden / ".receipt-shard-00003.jsonl.json").unlink()
    strays = [world.hidden / "shard-00003.jsonl.elsewhere-1.tmp", world.hidden / ".receipt-x.json.elsewhere-1.tmp"]
    for stray in strays:
        stray.touch()
    first = world.start("task", 1, shards=4, held=0)
    world.wait_for("begins", 5)
    assert not any(stray.exists() for stray in strays)
    assert [path.name for path in world.hidden.glob("shard-*")] == ["shard-00000.jsonl"]

    strays[0].touch()  # as if of a third task
    second = world.start("task", 2, shards=4)
    world.wait_for("begins", 6)
    world.go()
    assert second.wait(200) == 0
    assert strays[0].exists()
    assert first.wait(200) == 0
    assert max(Counter(world.noted("begins")[4:]).values()) == 1
    world.run("publisher", shards=4)
    assert world.published().manifest.digest == world.alone(shards=4).manifest.digest


def test_a_task_after_the_publication(world: World) -> None:
    one = world.alone(shards=2)
    world.run(None, shards=2)
    engines = len(world.noted("engine"))
    assert "reuse" in world.run("task", 1, shards=2)
    assert len(world.noted("engine")) == engines
    assert "reuse" in world.run("publisher", shards=2)
    assert world.published().manifest.digest == one.manifest.digest
    assert "was published by another run" in world.run("task", 1, code=2, shards=2, word="other")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_stopped_task_finishes_the_shard_in_hand(world: World, number: signal.Signals) -> None:
    attempt = world.folder / "attempt"
    attempt.mkdir()
    task = world.start("task", 1, shards=3, held=0, attempt=attempt)
    world.wait_for("begins")
    task.send_signal(number)
    world.go()
    assert task.wait(200) == 128 + number
    assert world.noted("made") == ["shard-00000.jsonl"]
    (failure,) = (json.loads(path.read_bytes()) for path in attempt.glob("failure-*.json"))
    assert (failure["kind"], failure["rank"]) == ("stopped", "1")


def test_every_task_tells_how_far_the_stage_is(world: World) -> None:
    attempts = [world.folder / f"task-{rank}" for rank in (1, 2)]
    for attempt in attempts:
        attempt.mkdir()
    first = world.start("task", 1, shards=6, held=4, attempt=attempts[0])
    world.wait_for("begins", 5)
    second = world.start("task", 2, shards=6, held=4, attempt=attempts[1])
    world.wait_for("begins", 6)  # the last one: four are made by the first, and one is held by it
    world.go()
    assert [task.wait(200) for task in (first, second)] == [0, 0]
    told = [json.loads((attempt / "progress.json").read_bytes()) for attempt in attempts]
    # Each has made one at least, so that who says six has counted the other's.
    assert {"done": 6, "total": 6, "unit": "shards"} in told


def test_a_process_that_comes_when_the_launchers_first_one_has_published(tmp_path: Path) -> None:
    """Nothing is left for it, and it leaves nothing."""
    publication = Publication(tmp_path / "out", PROMPTS, "shared", "0" * 64)
    publication.begin()
    (publication.state / f"begun-{files.process_name(os.getppid())}").touch()
    os.rename(publication.directory, publication.target)

    def never() -> Callable[[str], None]:
        raise AssertionError("it began to work")

    share_shards(Context(publication, 1, 2), ["shard-00000.jsonl"], never)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unknown_role_is_refused(world: World) -> None:
    assert "RATCHET_ROLE=worker is none of replica, task, publisher" in world.run("worker", code=2)
    assert not list(world.folder.glob(".out*"))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    for enter in (Publication.begin, Publication.join):
        with pytest.raises(UserError, match=f"the file system of {tmp_path}.*has no file locks.*-o flock"):
            enter(Publication(tmp_path / "out", PROMPTS, "prompts", "k" * 64), 1.0)


def test_scratch_files_of_processes_with_one_number_on_two_machines_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publication = Publication(tmp_path / "out", PROMPTS, "prompts", "k" * 64)
    names = set()
    for host in ("node1", "node2"):
        monkeypatch.setattr(files.socket, "gethostname", lambda host=host: host)
        names.add(publication.scratch("shard-00000.jsonl").name)
    assert names == {f"shard-00000.jsonl.{host}-{os.getpid()}.tmp" for host in ("node1", "node2")}


class Tasks(RuleBasedStateMachine):
    """Up to four tasks and publishers that go on one system call at a time, and are stopped and killed at any."""

    workers = Bundle("workers")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ratchet-tasks-"))
        self.target = self.root / "out"
        self.started: list[Writer] = []

    def living(self) -> list[Writer]:
        return [worker for worker in self.started if worker.alive]

    @rule(target=workers, role=st.sampled_from(["task", "task", "task", "publisher"]))
    def start(self, role: str) -> Writer:
        if len(self.living()) == 4:
            self.living()[0].kill()
        self.started.append(Writer(self.target, "new", role))
        return self.started[-1]

    @rule(worker=workers, calls=st.one_of(st.integers(1, 12), st.integers(30, 60)))
    def go_on(self, worker: Writer, calls: int) -> None:
        worker.go_on(calls)

    @rule(worker=workers)
    def run_to_the_end(self, worker: Writer) -> None:
        worker.go_on(1000)

    @rule(worker=consumes(workers))
    def kill(self, worker: Writer) -> None:
        worker.kill()

    @rule(worker=consumes(workers))
    def stop(self, worker: Writer) -> None:
        worker.stop()

    @invariant()
    def nobody_fails(self) -> None:
        """A task works or finds the directory taken; a publisher publishes, or says what is missing."""
        allowed = {"task": ("done",), "publisher": ("published", "transient: ")}
        for worker in self.started:
            told = ("killed", "stopped", "refused: another process is making", *allowed[worker.role or ""])
            assert worker.alive or (worker.ended or "").startswith(told), worker.ended

    @invariant()
    def no_finished_shard_is_made_again(self) -> None:
        assert max(Counter(line for worker in self.started for line in worker.made).values(), default=1) == 1

    def teardown(self) -> None:
        try:
            for worker in self.living():
                worker.kill()
            for role, ended in (("task", "done"), ("publisher", "published")):
                self.started.append(Writer(self.target, "new", role))
                assert self.started[-1].run() == ended
            self.no_finished_shard_is_made_again()
            assert seen_at(self.target, whole_digests()) == "new"
            assert strays(self.target, "new") == []
        finally:
            for worker in self.started:
                worker.kill()
            shutil.rmtree(self.root)


Tasks.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_interleaving_of_tasks_and_publishers = pytest.mark.chaos(Tasks.TestCase)


@pytest.mark.chaos
def test_tasks_at_full_speed_are_killed_and_stopped_at_any_instant(tmp_path: Path) -> None:
    """Four tasks at a time, each started again when it ends, until the shards are there; then a publisher. This until
    tasks have ended in most of the ways that there are: when signals come, the machine decides."""
    chance = random.Random(5)
    expected = whole_digests()["new"]
    endings: Counter[str] = Counter()
    noted = 0
    for number in range(300):
        if number >= 20 and len(endings) > 4 and noted > 15:
            break
        target = tmp_path / str(number) / "out"
        made = target.with_name("made")
        target.parent.mkdir()
        made.touch()
        for wave in range(3):
            living = {}
            for _ in range(4):
                living[fork_task(target, made)] = "ended"
                time.sleep(chance.choice([0.0, 0.002]))
            for pid in living:
                if wave < 2 and chance.random() < 0.7:
                    time.sleep(chance.uniform(0, 0.01))
                    how = chance.choice(["SIGKILL", "SIGTERM", "SIGUSR2"])
                    os.kill(pid, signal.Signals[how])
                    living[pid] = how
            for pid, how in living.items():
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                endings[f"{how} {code}"] += 1
                assert code in (0, {"ended": 0, "SIGKILL": -9, "SIGTERM": 143, "SIGUSR2": 140}[how])
        publisher = Writer(target, "new", "publisher")
        assert publisher.run() == "published"
        assert Artifact.open(target, PROMPTS).manifest.digest == expected
        assert strays(target, "new") == []
        names = made.read_text().split()  # without one whose task was killed before it could note it
        assert len(names) == len(set(names))
        noted += len(names)
    assert noted > 15
    assert len(endings) > 4, "the signals came too late"


def fork_task(target: Path, made: Path) -> int:
    """A process with the role of a task, at full speed; its process id."""
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)  # until it listens
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
        return pid
    code = 1
    try:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os.environ.update({"RATCHET_ROLE": "task", "RANK": "1", "WORLD_SIZE": "5"})

        def note(line: str) -> None:
            with made.open("a") as file:
                file.write(line.split()[-1] + "\n")

        test_contracts_store_model.tell = note
        test_contracts_store_model.skip_descriptions()
        stopping.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
        run_stage(SHARED, WordsConfig(word="new", output=target))
        code = 0
    except stopping.Stopped as stop:
        code = int(str(stop))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
