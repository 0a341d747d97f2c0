"""A stage that reads the shards of another while that one still makes them, under crashes of both.

The writers of test_contracts_store_model: processes that stop before each of their system calls.
"""

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_contracts_store_model import SHARDS, Writer, key_of

from contracts.artifacts import Artifact
from contracts.config import StageConfig, input_path
from contracts.declaration import Stage
from contracts.errors import TransientError, UserError
from contracts.following import FOLLOW, Producer, Source, announcement
from contracts.ledger import Ledger
from contracts.manifest import MANIFEST
from contracts.publication import Publication, finished_in, partial_directory
from contracts.records import PROMPTS, Message, Prompt
from contracts.stage import Context, Outcome, key_parts, stage_key
from contracts.workers import share_shards

NAMES = [f"shard-{number:05d}.jsonl" for number in range(SHARDS)]


class EchoConfig(StageConfig):
    """A stage that says again what another has published."""

    stage: ClassVar[str] = "echo"
    code_version: ClassVar[int] = 1

    words: Path = input_path()
    """Published prompts."""


@dataclass(frozen=True)
class Echo(Stage[EchoConfig]):
    """Its declaration."""

    def follows(self, config: EchoConfig) -> str | None:
        return "words"


def echo(config: EchoConfig, context: Context) -> Outcome:
    """Every shard in capital letters."""
    from test_contracts_store_model import tell  # of this process

    words = Source(config.words, PROMPTS)

    def make(name: str) -> None:
        rows = [Prompt(row.prompt_id, (said(row),)) for row in words.rows(name, Prompt)]
        ledger = Ledger("prompts")
        ledger.keep(len(rows))
        context.publication.write_rows(name, rows, ledger)
        tell(f"made {name}")

    share_shards(context, words, lambda: make)
    return Outcome("prompts", {"words": words.artifact.manifest.rows})


def said(row: Prompt) -> Message:
    return Message("user", str(row.messages[0].content).upper())


ECHO = Echo(EchoConfig, PROMPTS, f"{__name__}:echo")


class World:
    """A maker and a follower, of which one process each is at work at most."""

    def __init__(self, folder: Path) -> None:
        self.words = folder / "run" / "words"
        self.echo = folder / "run" / "echo"
        self.words.parent.mkdir(parents=True)
        self.config = EchoConfig(words=self.words, output=self.echo)
        self.maker: Writer | None = None
        self.follower: Writer | None = None
        self.made: list[str] = []
        """What followers have made, of those that are gone."""

    def start_maker(self, variant: str = "") -> None:
        """A process that makes the words; `variant`: what comes out otherwise although the key is the same."""
        self.kill_maker()
        self.maker = Writer(self.words, "new", variables={"VARIANT": variant})

    def start_follower(self) -> None:
        """A process that says again what is finished by now."""
        self.kill_follower()
        key = key_of("new")
        variables = {FOLLOW: announcement({str(self.words): Producer(key, key)})}
        self.follower = Writer(self.echo, "echo", job=(ECHO, self.config), variables=variables)

    def kill_maker(self) -> None:
        if self.maker is not None:
            self.maker.kill()
        self.maker = None

    def kill_follower(self) -> None:
        if self.follower is not None:
            self.follower.kill()
            self.made += self.follower.made
        self.follower = None

    def finish(self) -> None:
        """Both are published in the end, by whoever is at work or by others."""
        if self.maker is None or not self.maker.alive:
            self.start_maker()
        assert self.maker is not None
        assert self.maker.run() == "published", self.maker.ended
        if self.follower is None or not self.follower.alive:
            self.start_follower()
        assert self.follower is not None
        if self.follower.run().startswith("transient"):  # a shard has changed while it was read
            self.start_follower()
            self.follower.run()
        assert self.follower.ended == "published", self.follower.ended
        self.check()
        self.kill_maker()
        self.kill_follower()
        assert sorted(path.name for path in self.words.parent.iterdir()) == ["echo", "words"]
        listed = {MANIFEST, *(file.path for file in Artifact.open(self.echo).manifest.files)}
        assert set(os.listdir(self.echo)) == listed

    def check(self) -> None:
        """What is published is the echo of what is published, under the key that says so."""
        if not self.echo.exists():
            return
        words, echoed = Artifact.open(self.words, PROMPTS), Artifact.open(self.echo, PROMPTS)
        assert echoed.damage() == []
        assert list(echoed.rows(Prompt)) == [Prompt(row.prompt_id, (said(row),)) for row in words.rows(Prompt)]
        parts = key_parts(self.config, echoed.manifest.key_parts["versions"])
        assert echoed.manifest.key == stage_key(parts)
        assert echoed.manifest.inputs == {"words": words.manifest.digest}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def make_words(world: World, shards: int) -> None:
    """Have so many shards finished, and the maker at work; one more than there are: publish."""
    world.start_maker()
    assert world.maker is not None
    hidden = partial_directory(world.words, key_of("new"))
    while world.maker.alive and (shards > SHARDS or len(finished_in(hidden)) < shards):
        world.maker.step()


@pytest.mark.chaos
@pytest.mark.parametrize("finished", range(SHARDS + 2))
def test_a_follower_that_is_killed_before_any_system_call(finished: int, tmp_path: Path) -> None:
    """While nothing, something or all is finished, or published; the next one makes only what was missing."""
    calls, furthest = 0, 0
    left: set[tuple[object, ...]] = set()
    while calls < (110 if finished else 60):  # with nothing to read it waits from then on
        world = World(tmp_path / str(calls))
        make_words(world, finished)
        world.start_follower()
        assert world.follower is not None
        world.follower.go_on(calls)
        if not world.follower.alive:
            break
        furthest = max(furthest, len(world.follower.made))
        world.kill_follower()
        world.check()
        if (state := (*world.made, *contents(world.echo.parent))) not in left:  # a call that only reads leaves the same
            left.add(state)
            world.finish()
            assert len(world.made) == len(set(world.made)), f"made again after a crash before call {calls}"
        world.kill_maker()
        shutil.rmtree(tmp_path / str(calls))
        calls += 1
    assert calls > 50
    assert len(left) > 3
    assert furthest == min(finished, SHARDS)


def contents(folder: Path) -> list[tuple[str, bytes]]:
    """Every path below a folder, and what is in it, but for process ids in names and times in manifests."""
    found = []
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        name = re.sub(r"-\d+\.tmp$", ".tmp", str(path.relative_to(folder)))
        found.append((name, content[:1] if name.partition("/")[2].startswith(MANIFEST) else content))
    return found


def test_a_follower_reads_what_is_finished_and_publishes_when_its_maker_has(world: World) -> None:
    make_words(world, 1)
    world.start_follower()
    assert world.follower is not None
    world.follower.go_on(200)
    assert world.follower.made == [f"made {NAMES[0]}"]
    assert world.follower.alive
    world.finish()
    assert sorted(world.made) == [f"made {name}" for name in NAMES]


def test_what_a_follower_needs_is_loaded_before_the_first_shard_is_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLLOW, announcement({str(world.words): Producer(key_of("new"), key_of("new"))}))
    publication = Publication(world.echo, PROMPTS, "echo", None, hidden_key="k" * 64)
    publication.begin()
    opened: list[str] = []

    def open_worker() -> Callable[[str], None]:
        opened.append("engine")
        make_words(world, SHARDS + 1)
        return make

    def make(name: str) -> None:
        rows = source.rows(name, Prompt)
        ledger = Ledger("prompts")
        ledger.keep(len(rows))
        publication.write_rows(name, rows, ledger)
        opened.append(name)

    source = Source(world.words, PROMPTS)
    share_shards(Context(publication, 0, 1), source, open_worker)
    assert opened == ["engine", *NAMES]


def test_a_torn_shard_is_not_read(world: World) -> None:
    """As a power cut leaves it: its maker sees that, and makes it again."""
    make_words(world, 1)
    world.kill_maker()
    shard = partial_directory(world.words, key_of("new")) / NAMES[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-20] + bytes(20))
    world.start_follower()
    assert world.follower is not None
    world.follower.go_on(200)
    assert world.follower.made == []
    world.finish()
    assert len(world.made) == SHARDS


def test_what_was_made_from_other_content_than_is_published_is_made_again(world: World) -> None:
    make_words(world, 1)
    world.start_follower()
    assert world.follower is not None
    world.follower.go_on(200)
    world.kill_maker()
    shutil.rmtree(partial_directory(world.words, key_of("new")))
    world.start_maker("other words")
    world.finish()
    assert Counter(world.made) == {f"made {NAMES[0]}": 2, f"made {NAMES[1]}": 1}


def test_an_input_under_another_key_than_was_announced_is_not_taken(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLLOW, announcement({str(world.words): Producer("0" * 64, "0" * 64)}))
    source = Source(world.words, PROMPTS)
    assert source.names() == []
    assert not source.refresh()
    make_words(world, SHARDS + 1)
    with pytest.raises(TransientError, match=r"published under the key .*, but this stage was to follow 000000000000"):
        source.refresh()


def test_what_nobody_makes_cannot_be_followed(world: World) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Source(world.words, PROMPTS)


def test_a_shard_that_was_not_read_through_the_source_is_refused(world: World) -> None:
    make_words(world, SHARDS + 1)
    publication = Publication(world.echo, PROMPTS, "echo", "k" * 64)
    publication.begin()
    publication.made_from = Source(world.words, PROMPTS).made_from
    with pytest.raises(AssertionError, match=r"was not read through Source\.rows"):
        publication.write_rows(NAMES[0], [], Ledger("prompts"))
    publication.write_rows("summary.jsonl", [], Ledger("prompts"))
    assert publication.receipt("summary.jsonl") is not None


def test_the_publisher_of_tasks_does_not_wait_for_an_input(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLLOW, announcement({str(world.words): Producer(key_of("new"), key_of("new"))}))
    context = Context(Publication(world.echo, PROMPTS, "echo", "k" * 64), 0, 1, "publisher")
    with pytest.raises(TransientError, match=r"words is not published; the stage that makes it ended without it"):
        share_shards(context, Source(world.words, PROMPTS), lambda: lambda name: None)


class Stream(RuleBasedStateMachine):
    """A maker and a follower that are started and killed at any call; the maker's results may vary."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ratchet-stream-"))
        self.world = World(self.root)

    @rule(variant=st.sampled_from(["", "", "other"]))
    def start_maker(self, variant: str) -> None:
        if not self.world.words.exists():
            self.world.start_maker(variant)

    @rule()
    def start_follower(self) -> None:
        if self.world.maker is not None and not self.world.echo.exists():
            self.world.start_follower()

    @rule(calls=st.one_of(st.integers(1, 12), st.integers(30, 80)))
    def make(self, calls: int) -> None:
        if self.world.maker is not None:
            self.world.maker.go_on(calls)

    @rule(calls=st.one_of(st.integers(1, 12), st.integers(30, 80)))
    def follow(self, calls: int) -> None:
        if self.world.follower is not None:
            self.world.follower.go_on(calls)

    @rule()
    def crash_maker(self) -> None:
        self.world.kill_maker()

    @rule()
    def crash_follower(self) -> None:
        self.world.kill_follower()

    @rule(words=st.booleans())
    def lose_what_is_hidden(self, words: bool) -> None:
        """Somebody deletes what was begun, while nobody is at work on it."""
        worker, output = (self.world.maker, self.world.words) if words else (self.world.follower, self.world.echo)
        if worker is None or not worker.alive:
            for hidden in output.parent.glob(f".{output.name}.partial-*"):
                shutil.rmtree(hidden)

    @invariant()
    def nothing_wrong_is_published(self) -> None:
        self.world.check()

    @invariant()
    def nobody_fails(self) -> None:
        for writer in (self.world.maker, self.world.follower):
            if writer is not None and writer.ended is not None:
                assert writer.ended == "published" or writer.ended.startswith("transient: "), writer.ended

    def teardown(self) -> None:
        try:
            self.world.finish()
        finally:
            self.world.kill_maker()
            self.world.kill_follower()
            shutil.rmtree(self.root)


Stream.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_order_of_kills_of_maker_and_follower = pytest.mark.chaos(Stream.TestCase)
