"""The store under crashes and concurrency: writers that stop before every system call, and readers at any time.

Each writer is a process of its own that runs a stage and waits before each of its system calls on files until it is
told to go on, or is killed there. So every interleaving of several writers, and a crash at every place, can be tried.
Whatever happens, a reader sees nothing, or the whole of one artifact, and nothing that was finished is made again.
"""

import functools
import os
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from contracts import attempt, following, publication, stage, stopping
from contracts.artifacts import Artifact
from contracts.config import StageConfig, identity
from contracts.declaration import Stage
from contracts.errors import TransientError, UserError
from contracts.ledger import Ledger
from contracts.publication import partial_directory
from contracts.records import PROMPTS, Message, Prompt
from contracts.stage import Context, Outcome, key_parts, run_stage, stage_key
from contracts.workers import share_shards

SECONDS = 200.0
"""No step of a writer takes longer."""
SHARDS = 2


class WordsConfig(StageConfig):
    """A stage that publishes two shards of a word."""

    stage: ClassVar[str] = "words"
    code_version: ClassVar[int] = 1

    word: str = identity()
    """What the prompts consist of."""


COMMAND = Stage(WordsConfig, PROMPTS, f"{__name__}:make_words")
SHARED = Stage(WordsConfig, PROMPTS, f"{__name__}:share_words")


def make_words(config: WordsConfig, context: Context) -> Outcome:
    """Make the shards that are missing, and tell each that has its receipt."""
    finished = context.publication.receipts()
    (context.publication.state / "note").touch()
    for number in range(SHARDS):
        if f"shard-{number:05d}.jsonl" not in finished:
            _make(config, context, number)
    return Outcome("prompts")


def share_words(config: WordsConfig, context: Context) -> Outcome:
    """The same, in shards that several processes share."""
    numbers = {f"shard-{number:05d}.jsonl": number for number in range(SHARDS)}
    share_shards(context, list(numbers), lambda: lambda name: _make(config, context, numbers[name]))
    return Outcome("prompts")


def _make(config: WordsConfig, context: Context, number: int) -> None:
    ledger = Ledger("prompts")
    ledger.keep(2)
    text = config.word * 50 + os.environ.get("VARIANT", "")
    rows = [Prompt(f"{number}{i}", (Message("user", text),)) for i in range(2)]
    context.publication.write_rows(f"shard-{number:05d}.jsonl", rows, ledger)
    tell(f"made {config.word} shard-{number:05d}.jsonl")


def key_of(word: str) -> str:
    return stage_key(key_parts(WordsConfig(word=word, output=Path("anywhere")), {}))


Job: TypeAlias = tuple[Stage[Any], StageConfig]

tell: Any = print
"""How a stage speaks to its test; set in the process of a writer."""


class Writer:
    """A process that runs the stage, one system call at a time."""

    def __init__(
        self,
        target: Path,
        word: str,
        role: str | None = None,
        job: Job | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """By default it publishes a word; `job`: another stage and its config; `variables`: of its environment."""
        self.word = word
        self.role = role
        chosen = job or (COMMAND if role is None else SHARED, WordsConfig(word=word, output=target))
        self.ended: str | None = None
        """published (a task: done), stopped, or the error; None while it runs."""
        self.made: list[str] = []
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self._rest = b""
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self._orders)
                os.close(self._answers)
                os.environ.update(variables or {})
                _write(target, role, chosen, orders, answers)
                code = 0
            finally:
                os._exit(code)
        os.close(orders)
        os.close(answers)
        self._await_call()

    @property
    def alive(self) -> bool:
        """Whether it has more to do."""
        return self.ended is None

    def step(self) -> None:
        """Let it do its next system call, and whatever follows up to the one after."""
        os.write(self._orders, b".")
        self._await_call()

    def go_on(self, calls: int) -> None:
        """Let it do some system calls, or what is left of them."""
        for _ in range(calls):
            if self.alive:
                self.step()

    def run(self) -> str:
        """Let it run to its end, which is returned."""
        while self.ended is None:
            self.step()
        return self.ended

    def kill(self) -> None:
        """SIGKILL, before its next system call."""
        if self.alive:
            self._leave("killed")

    def stop(self) -> None:
        """SIGTERM, before its next system call."""
        if self.alive:
            os.kill(self.pid, signal.SIGTERM)
            self.step()

    def _leave(self, how: str) -> None:
        self.ended = how
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._orders)
        os.close(self._answers)

    def _await_call(self) -> None:
        while (line := self._line()) != "call":
            if line.startswith("made "):
                self.made.append(line)
            else:
                self._leave(line)
                return

    def _line(self) -> str:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], SECONDS)
            assert ready, "a writer hangs"
            more = os.read(self._answers, 1 << 16)
            assert more, "a writer ended without a word"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return line.decode()


def _write(target: Path, role: str | None, job: Job, orders: int, answers: int) -> None:
    """The writer's process: run the stage, and ask before every system call on its files."""
    global tell

    def say(line: str) -> None:
        os.write(answers, line.encode() + b"\0")

    def ask(*_: object, **__: object) -> None:
        say("call")
        if not os.read(orders, 1):
            os._exit(1)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "fcntl.flock" or (
            event.partition(".")[0] in ("open", "os", "shutil") and _is_below(target.parent, arguments)
        ):
            ask()

    def asking(call: Any) -> Any:
        def function(path: Any, *arguments: Any, **options: Any) -> Any:
            if _is_below(target.parent, (path,)):
                ask()
            return call(path, *arguments, **options)

        return function

    tell = say
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.stat = asking(os.stat)  # which no audit event tells of
    skip_descriptions()
    stage.LOCK_SECONDS = 0  # nobody waits: who would have to is refused
    following.POLL_SECONDS = 0
    if role is not None:
        stopping.listen()
        os.environ.update({attempt.ROLE: role, stopping.GRACE: "600"})
    if role == "task":
        os.environ.update({"RANK": "1", "WORLD_SIZE": "2"})
    sys.addaudithook(audit)
    try:
        run_stage(*job)
    except stopping.Stopped:
        say("stopped")
    except TransientError as error:
        say(f"transient: {error}")
    except UserError as error:
        say(f"refused: {error}")
    except BaseException:
        say(traceback.format_exc())
    else:
        say("done" if role == "task" else "published")
    os.read(orders, 1)  # to be killed


def skip_descriptions() -> None:
    """Have this process, a fork, not describe its code and machine: that would take most of its time."""
    stage.begin_measuring = lambda: None
    stage.source_version = lambda package: "0123456789abcdef"
    stage.installed_versions = dict
    publication.hardware = dict


def _is_below(root: Path, arguments: tuple[Any, ...]) -> bool:
    return bool(arguments) and isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(str(root))


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    """The digest of each word's artifact."""
    return whole_digests()


@functools.cache
def whole_digests() -> dict[str, str]:
    """Made by writers that nobody disturbs."""
    found = {}
    for word in ("old", "new"):
        with tempfile.TemporaryDirectory() as folder:
            assert Writer(Path(folder) / "out", word).run() == "published"
            found[word] = Artifact.open(Path(folder) / "out").manifest.digest
    return found


def seen_at(target: Path, digests: dict[str, str]) -> str | None:
    """What a reader finds: nothing, or the whole of one artifact, whose word is returned."""
    if not target.exists():
        return None
    artifact = Artifact.open(target, PROMPTS)
    assert artifact.damage() == []
    word = next(word for word, digest in digests.items() if digest == artifact.manifest.digest)
    rows = [row.prompt_id for row in artifact.rows(Prompt)]
    assert rows == [f"{number}{i}" for number in range(SHARDS) for i in range(2)]
    return word


def strays(target: Path, word: str) -> list[str]:
    """What is beside the published artifact and inside it, and should not be."""
    listed = {"manifest.json", *(file.path for file in Artifact.open(target).manifest.files)}
    hidden = partial_directory(target, key_of(word))
    return [*(set(os.listdir(target)) - listed), *([hidden.name] if hidden.exists() else [])]


@pytest.mark.chaos
def test_a_crash_before_any_system_call(digests: dict[str, str], tmp_path: Path) -> None:
    """Killed at its first call, at its second, and so on; then another one ends it, and makes only what was missing."""
    calls = 0
    while True:
        target = tmp_path / str(calls) / "out"
        target.parent.mkdir()
        writer = Writer(target, "new")
        for _ in range(calls):
            if writer.alive:
                writer.step()
                assert seen_at(target, digests) in (None, "new")
        if not writer.alive:
            break
        writer.kill()
        seen_at(target, digests)
        other = Writer(target, "new")
        assert other.run() == "published", f"after a crash before call {calls}"
        assert seen_at(target, digests) == "new"
        assert not set(writer.made) & set(other.made), f"made again after a crash before call {calls}"
        assert strays(target, "new") == [], f"after a crash before call {calls}"
        shutil.rmtree(target.parent)
        calls += 1
    assert writer.ended == "published"
    assert calls > 50, "the writer's system calls are not seen"


def count_calls(folder: Path) -> int:
    """How many system calls a writer makes that nobody disturbs."""
    writer, calls = Writer(folder / "out", "new"), 0
    while writer.alive:
        writer.step()
        calls += 1
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("first_one", ["goes on", "is killed"])
def test_two_writers_meet_at_the_end(first_one: str, digests: dict[str, str], tmp_path: Path) -> None:
    """Between the last calls of a writer, another one does some of its own, then the first goes on, or is killed."""
    (tmp_path / "alone").mkdir()
    calls = count_calls(tmp_path / "alone")
    outcomes: Counter[str] = Counter()
    for before in range(calls - 12, calls):
        for between in range(before % 2, 20, 2):
            target = tmp_path / f"{before}-{between}" / "out"
            target.parent.mkdir()
            first = Writer(target, "new")
            first.go_on(before)
            second = Writer(target, "new")
            second.go_on(between)
            if first_one == "goes on":
                first.run()
            else:
                first.kill()
            outcomes[second.run()[:7]] += 1
            assert first.ended == ("published" if first_one == "goes on" else "killed")
            assert Writer(target, "new").run() == "published"
            assert seen_at(target, digests) == "new"
            assert strays(target, "new") == []
            assert len(first.made + second.made) == SHARDS
            shutil.rmtree(target.parent)
    assert set(outcomes) == {"publish", "refused"}


def test_what_is_set_aside_before_any_system_call_of_a_writer_is_no_fault(
    digests: dict[str, str], tmp_path: Path
) -> None:
    """A driver sets aside what another key has published while a writer looks at it: it is refused, or publishes."""
    outcomes: Counter[str] = Counter()
    for calls in range(12):
        target = tmp_path / str(calls) / "out"
        target.parent.mkdir()
        assert Writer(target, "old").run() == "published"
        writer = Writer(target, "new")
        writer.go_on(calls)
        os.rename(target, target.with_name("aside"))
        outcomes[writer.run()[:7]] += 1
        writer.kill()
    assert set(outcomes) == {"publish", "refused"}


class Store(RuleBasedStateMachine):
    """Up to three writers of two keys, crashes, and a driver that sets aside what another key has published."""

    writers = Bundle("writers")
    digests: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ratchet-store-"))
        self.target = self.root / "run" / "out"
        self.target.parent.mkdir()
        self.started: list[Writer] = []
        self.aside = 0
        self.seen: str | None = None
        if not self.digests:
            self.digests.update(whole_digests())

    def living(self) -> list[Writer]:
        return [writer for writer in self.started if writer.alive]

    @rule(target=writers, word=st.sampled_from(["new", "new", "old"]))
    def start(self, word: str) -> Writer:
        if len(self.living()) == 3:
            self.living()[0].kill()
        self.started.append(Writer(self.target, word))
        return self.started[-1]

    @rule(writer=writers, calls=st.one_of(st.integers(1, 12), st.integers(50, 80)))
    def go_on(self, writer: Writer, calls: int) -> None:
        for _ in range(calls):
            if writer.alive:
                writer.step()
                self.read()

    @rule(writer=writers)
    def run_to_the_end(self, writer: Writer) -> None:
        while writer.alive:
            writer.step()
            self.read()

    @rule(writer=consumes(writers))
    def crash(self, writer: Writer) -> None:
        writer.kill()

    @rule()
    def set_aside(self) -> None:
        """Nobody does that while the process that has published still reads it."""
        if self.seen and not any(writer.alive and writer.word == self.seen for writer in self.started):
            self.aside += 1
            os.rename(self.target, self.root / f"aside-{self.aside}")
            self.seen = None

    @invariant()
    def read(self) -> None:
        """What was published stays, whole, until it is set aside."""
        now = seen_at(self.target, self.digests)
        assert self.seen in (None, now)
        self.seen = now

    @invariant()
    def nobody_fails(self) -> None:
        """A writer is refused while another one lives, or where another key is published; it never breaks."""
        for writer in self.started:
            assert writer.alive or writer.ended in ("published", "killed") or writer.ended.startswith("refused: "), (
                writer.ended
            )

    def teardown(self) -> None:
        try:
            for writer in self.started:
                writer.kill()
            self.end()
        finally:
            for writer in self.started:
                writer.kill()
            shutil.rmtree(self.root)

    def end(self) -> None:
        """After all that, a writer of each key still publishes it, and leaves nothing else."""
        for word in ("old", "new"):
            if self.seen not in (None, word):
                self.set_aside()
            last = Writer(self.target, word)
            self.started.append(last)
            assert last.run() == "published", last.ended
            self.read()
            assert self.seen == word
            assert strays(self.target, word) == []


Store.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_interleaving_of_writers_crashes_and_readers = pytest.mark.chaos(Store.TestCase)


@pytest.mark.slow
def test_two_processes_publish_the_same_at_once(digests: dict[str, str], tmp_path: Path) -> None:
    """Both at full speed, until they have met often: at least one publishes, the other does as well or is refused."""
    outcomes: Counter[str] = Counter()
    for number in range(2000):
        if number >= 50 and outcomes["[0, 2]"] >= 5:
            break
        target = tmp_path / str(number) / "out"
        children = []
        start, go = os.pipe()
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.close(go)
                    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
                    skip_descriptions()
                    os.read(start, 1)  # until the other end is closed: both begin in the same instant
                    run_stage(COMMAND, WordsConfig(word="new", output=target))
                    code = 0
                except UserError as error:
                    code = 2 if "another process is making" in str(error) else 1
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(pid)
        os.close(start)
        os.close(go)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
        outcomes[str(codes)] += 1
        assert codes in ([0, 0], [0, 2]), f"round {number}"
        assert seen_at(target, digests) == "new"
        assert os.listdir(target.parent) == ["out"]
        assert strays(target, "new") == []
    assert outcomes["[0, 2]"] >= 5, "they hardly ever met"
