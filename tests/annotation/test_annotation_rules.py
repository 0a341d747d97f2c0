"""Rules run in processes of their own: what a function may do there, how its end is told, and what survives a kill."""

import collections
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from annotation_world import ROOT, make_rollout, make_rollouts, publish_rollouts, run_cli

from annotation.samples import Sample
from annotation.scorers import score_config
from annotation.scorers.base import Opening
from annotation.scorers.rule import RuleSettings
from annotation.stages.score import SCORE
from annotation.workers.pool import stall_seconds
from annotation.workers.rule import Rule, check_function
from contracts.artifacts import Artifact
from contracts.attempt import STALL
from contracts.errors import UserError
from contracts.preflight import PreflightReport
from contracts.records import Message, Rollout, Score
from contracts.stage import run_stage
from pipelines.execution.endings import progress_of

HEAD = """
import asyncio, ctypes, os, pathlib, signal, subprocess, sys, threading, time
def note(text):
    with open(__file__ + ".log", "a") as file:
        file.write(text + "\\n")
note("imported %d" % os.getpid())
"""


def write(tmp_path: Path, text: str, head: str = HEAD) -> str:
    """A rule of the name `judge`."""
    path = tmp_path / "my_rule.py"
    path.write_text(head + text)
    return f"{path}:judge"


def noted(tmp_path: Path) -> list[str]:
    log = tmp_path / "my_rule.py.log"
    return log.read_text().splitlines() if log.exists() else []


def score(tmp_path: Path, rollouts: Artifact, function: str, output: str = "scores", **keys: Any) -> Artifact:
    config = score_config(
        output=tmp_path / output, rollouts=rollouts.path, kind="rule", function=function, **keys
    )  # fmt: skip
    found = run_stage(SCORE, config)
    assert found is not None
    return found


def processes(tmp_path: Path) -> list[int]:
    """Those that have imported the rule."""
    return [int(line.split()[1]) for line in noted(tmp_path) if line.startswith("imported ")]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def values(scores: Artifact) -> dict[tuple[str, int], float]:
    return {(row.prompt_id, row.sample): row.score for row in scores.rows(Score)}


@pytest.fixture
def answers(tmp_path: Path) -> Artifact:
    """One shard: three prompts with two answers, of which the second one of the second prompt is `bad .`."""
    texts = [["good .", "great ."], ["awful .", "bad ."], ["blue .", "long ."]]
    rollouts = [make_rollout(number, pair) for number, pair in enumerate(texts)]
    return publish_rollouts(tmp_path / "rollouts", rollouts, shard=8)


ENDS = {
    "os._exit(3)": "ended its process on .*, sample 1: it left with exit code 3, as by os._exit",
    "sys.exit(4)": "failed on .*, sample 1: SystemExit: 4",
    "raise KeyboardInterrupt": "failed on .*, sample 1: KeyboardInterrupt: ",
    "raise ValueError(chr(0xdc00))": r"failed on .*, sample 1: ValueError: \\udc00 \(",
    "ctypes.string_at(0)": "ended its process on .*, sample 1: it crashed by SIGSEGV",
    "os.kill(os.getpid(), signal.SIGKILL)": "ended its process on .*, sample 1: it was killed by SIGKILL: .*memory",
    "os.closerange(3, 512); time.sleep(60)": "ended its process on .*, sample 1: it closed the connection",
    "return asyncio.sleep(0)": "returned an awaitable for .*, sample 1",
    "return 10 ** 400": "gave a number too large for a float for .*, sample 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_a_function_that_ends_its_process_is_named_with_the_sample_or_counts_as_failed(
    tmp_path: Path, answers: Artifact, end: str
) -> None:
    function = write(
        tmp_path,
        f"""
def judge(messages, response, finish_reason, answer):
    if response == "bad .":
        {end}
    return len(response)
""",
    )
    with pytest.raises(UserError, match=re.escape(f"function {function!r} ") + ENDS[end]):
        score(tmp_path, answers, function)
    assert sorted(path.name for path in tmp_path.iterdir() if "score" in path.name) == []
    found = score(tmp_path, answers, function, fail_on_error=0.2)
    assert found.manifest.ledger.dropped == {"failed": 1}
    assert sorted(values(found).values()) == [6.0, 6.0, 6.0, 7.0, 7.0]
    (message,) = found.manifest.facts["failures"]
    assert re.search(ENDS[end], message)


HANGS = {
    "in C code that holds all": "ctypes.PyDLL(None).sleep(1000)",
    "swallowing what comes": """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        while True:
            try:
                time.sleep(1000)
            except BaseException:
                pass""",
    "with children": """
        child = subprocess.Popen(["sleep", "1000"])
        note("child %d" % child.pid)
        child.wait()""",
}


@pytest.mark.parametrize("how", HANGS)
def test_a_function_that_hangs_is_ended_with_its_children_and_fails_on_one_sample(
    tmp_path: Path, answers: Artifact, how: str
) -> None:
    function = write(
        tmp_path,
        f"""
def judge(messages, response, finish_reason, answer):
    if response == "bad .":
        {HANGS[how].strip()}
    return len(response)
""",
    )
    found = score(tmp_path, answers, function, fail_on_error=0.2, seconds_per_sample=1)
    assert found.manifest.ledger.dropped == {"failed": 1}
    (message,) = found.manifest.facts["failures"]
    assert f"function {function!r} has not scored prompt" in message
    assert ", sample 1 after 1 s, and was killed" in message
    assert "seconds_per_sample" in message
    assert "fail_on_error" in message
    for line in noted(tmp_path):
        if line.startswith("child"):
            state = Path(f"/proc/{line.split()[1]}/stat")
            assert not state.exists() or state.read_text().split()[2] == "Z"
    assert any(line.startswith("child") for line in noted(tmp_path)) == (how == "with children")


def test_a_stall_limit_of_a_run_holds_for_a_judgement_that_has_none(
    tmp_path: Path, answers: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is the function that is named, at once, not a stage that stalled and is tried again."""
    monkeypatch.setenv(STALL, "1")
    assert stall_seconds() == 1
    function = write(tmp_path, "def judge(response, **others):\n    time.sleep(1000 * (response == 'bad .'))")
    with pytest.raises(UserError, match=r"has not scored .*, sample 1 after 1 s"):
        score(tmp_path, answers, function)
    with pytest.raises(UserError, match=r"was not imported after 1 s; .*executor\.stall_seconds"):
        score(tmp_path, answers, write(tmp_path, "time.sleep(1000)\ndef judge(**others): ..."))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sys.exit(5)\ndef judge(**all): ...", r"cannot be imported: SystemExit: 5"),
        ("os._exit(6)\ndef judge(**all): ...", r"ended the process that imports it: it left with exit code 6"),
        ("raise KeyboardInterrupt\ndef judge(**all): ...", r"cannot be imported: its module raised KeyboardInterrupt"),
        ("import nowhere_to_be_found\ndef judge(**all): ...", r"cannot be imported: ModuleNotFoundError: .*nowhere_to"),
        ("async def judge(**all): yield 1", r"is an async generator; return its results"),
        ("def judge(prompt, response): ...", r"takes \(prompt, response\), but is called with the keywords messages, "),
        ("def judge(*, inputs, **all): ...", r"takes inputs, but its scorer sets none. Set inputs="),
    ],
)
def test_a_function_that_cannot_be_loaded_or_called_is_refused(
    tmp_path: Path, answers: Artifact, text: str, message: str
) -> None:
    function = write(tmp_path, text)
    config = score_config(
        output=tmp_path / "scores", rollouts=answers.path, kind="rule", function=function, fail_on_error=0.9
    )
    for look in (lambda: check_function(cast(RuleSettings, config)), lambda: run_stage(SCORE, config)):
        with pytest.raises(UserError, match=f"function {re.escape(repr(function))}:? {message}"):
            look()
    assert not (tmp_path / "scores").exists()


def test_a_function_that_takes_long_to_import_is_told_and_not_refused(tmp_path: Path) -> None:
    def check(text: str, seconds: float) -> str | None:
        function = write(tmp_path, text)
        config = score_config(output=tmp_path / "scores", rollouts=tmp_path, kind="rule", function=function)
        return check_function(cast(RuleSettings, config), seconds)

    assert "was not imported after 0.5 s" in (check("time.sleep(1000)\ndef judge(**others): ...", 0.5) or "")
    assert check("def judge(**others): ...", 60) is None


def test_what_a_function_prints_does_not_mix_with_the_answer_of_preflight(tmp_path: Path) -> None:
    """Not even without a newline, or when its process ends."""
    text = "sys.stdout.write('one')\nimport atexit\natexit.register(lambda: os.write(1, b'two'))\ndef judge(**all): ..."
    config = {"rollouts": "made-by/generation", "kind": "rule", "function": write(tmp_path, text), "output": "any"}
    request = {
        "stages": [
            {"name": "reward", "package": "annotation", "command": "score", "config": config, "made": ["rollouts"]}
        ]
    }
    command = [sys.executable, "-m", "contracts.preflight"]
    told = subprocess.run(command, cwd=ROOT, input=json.dumps(request), capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == msgspec.to_builtins(PreflightReport())
    assert {"one", "two"} <= {told.stderr[:3], told.stderr[3:6]}


def test_what_a_function_can_rely_on(tmp_path: Path) -> None:
    """Globals that last, a main thread of its own (signal.alarm), child processes, a log, tags, tools and inputs."""
    known = {"messages": (Message("user", "hello"),), "tags": ("math", "hard"), "tools": ({"name": "f"},)}
    rollout = msgspec.structs.replace(make_rollouts(1, 3)[0], **known)
    rollouts = publish_rollouts(tmp_path / "rollouts", [rollout])
    (tmp_path / "words.json").write_text("[3]")
    function = write(
        tmp_path,
        """
import json, multiprocessing
seen = []
def square(x):
    return x * x
def judge(*, messages, response, finish_reason, answer, tags, tools, inputs):
    assert messages == [{"role": "user", "content": "hello"}], messages
    assert tags == ["math", "hard"] and tools == [{"name": "f"}]
    assert threading.current_thread() is threading.main_thread()
    def late(*_): raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(10)
    except TimeoutError:
        pass
    with multiprocessing.get_context("fork").Pool(1) as pool:
        squares = pool.map(square, json.loads(inputs[0].read_text()))
    print("printed by the rule")
    sys.stderr.write("and to stderr\\n")
    if os.fork() == 0:
        return 77.0  # a copy that comes back judges nothing
    seen.append(response)
    return squares[0] + len(seen) / 10
""",
    )
    config = ["rollouts=" + str(rollouts.path), "kind=rule", f"function={function}", f"inputs=[{tmp_path}/words.json]"]
    told = run_cli("score", *config, f"output={tmp_path}/scores")
    assert told.stdout.count("printed by the rule") == 3
    assert told.stderr.count("and to stderr") == 3
    assert sorted(values(Artifact.open(tmp_path / "scores")).values()) == [9.1, 9.2, 9.3]


def test_what_is_read_beside_the_function_is_in_the_key(tmp_path: Path, answers: Artifact) -> None:
    (tmp_path / "my_helper.py").write_text("def weigh(text, table): return table[text[0]]\n")
    words = tmp_path / "words.json"
    words.write_text('{"g": 1, "a": 2, "b": 3, "l": 4}')
    function = write(
        tmp_path,
        """
import json, my_helper
def judge(response, inputs, **others):
    return my_helper.weigh(response, json.loads(inputs[0].read_text()))
""",
    )
    first = score(tmp_path, answers, function, inputs=[words])
    assert sorted(values(first).values()) == [1.0, 1.0, 2.0, 3.0, 3.0, 4.0]
    assert score(tmp_path, answers, function, inputs=[words]).manifest.created == first.manifest.created
    words.write_text('{"g": 5, "a": 2, "b": 3, "l": 4}')
    with pytest.raises(UserError, match="was published by another run"):
        score(tmp_path, answers, function, inputs=[words])
    second = score(tmp_path, answers, function, "second", inputs=[words])
    assert sorted(values(second).values()) == [2.0, 3.0, 3.0, 4.0, 5.0, 5.0]
    (tmp_path / "my_helper.py").write_text("def weigh(text, table): return 0\n")
    third = score(tmp_path, answers, function, "third", inputs=[words])
    assert set(values(third).values()) == {0.0}
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        score(tmp_path, answers, function, "fourth", inputs=[tmp_path / "nowhere.json"])


def test_a_process_that_ends_between_two_shards_takes_no_sample_with_it(tmp_path: Path) -> None:
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(4, 2), shard=2)
    function = write(
        tmp_path,
        """
judged = []
def judge(response, **others):
    judged.append(response)
    if len(judged) == 4:  # the last one of a shard
        threading.Timer(0.05, os._exit, [1]).start()
    return len(response)
""",
    )
    config = score_config(output=tmp_path / "scores", rollouts=rollouts.path, kind="rule", function=function)
    rule = Rule(config, Opening(tmp_path, lambda: 8))
    samples = [Sample(rollout, completion) for rollout in rollouts.rows(Rollout) for completion in rollout.completions]
    found = rule(samples[:4])
    (first,) = processes(tmp_path)
    wait_until(lambda: not is_alive(first))
    found += rule(samples[4:])
    assert [getattr(score, "score", None) for score in found] == [len(sample.completion.text) for sample in samples]
    assert len(processes(tmp_path)) == 2


def test_samples_of_one_shard_are_spread_over_processes_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(6, 4), shard=99)
    together = """
folder = pathlib.Path(__file__).parent / "judging"
def judge(response, **others):
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < int((folder.parent / "processes").read_text()):
        time.sleep(0.01)
    time.sleep(0.002 * (len(response) % 3))
    note("judged %d" % os.getpid())
    return None if "awful" in response else len(response)
"""
    function = write(tmp_path, together)
    found = []
    for count in (1, 4):
        (tmp_path / "processes").write_text(str(count))
        (tmp_path / "judging").mkdir()
        found.append(score(tmp_path, rollouts, function, f"by {count}", max_dropped=1, replicas=count))
        (tmp_path / "judging").rename(tmp_path / f"had judged {count}")
        (tmp_path / "my_rule.py.log").rename(tmp_path / f"log of {count}")
    one, four = found
    assert four.manifest.digest == one.manifest.digest
    lines = (tmp_path / "log of 4").read_text().splitlines()
    judged = collections.Counter(line for line in lines if line.startswith("judged"))
    assert judged.total() == 24
    assert len(judged) == 4


@pytest.mark.slow
def test_a_judgement_is_not_paid_for_twice(tmp_path: Path) -> None:
    """The stage is killed, a line of what it had written down is torn, it fails by the user's mistake, and goes on."""
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(5, 4), shard=99)
    judge = """
def judge(messages, response, **others):
    note("judged %s %s" % (len(messages[0]["content"]), response))
    time.sleep(0.1)  # what costs nothing is not kept
    while open(__file__ + ".log").read().count("judged") >= int(open(__file__ + ".last").read() or 0):
        time.sleep(0.01)
    if os.path.exists(__file__ + ".broken"):
        raise ConnectionError("the judge is down")
    return len(response) / 3
"""
    function = write(tmp_path, judge)
    last = tmp_path / "my_rule.py.last"  # the number of the judgement that waits
    last.write_text("1000")
    whole = score(tmp_path, rollouts, function, "whole")
    log = tmp_path / "my_rule.py.log"
    log.unlink()
    command = [sys.executable, "-m", "annotation", "score", f"rollouts={rollouts.path}", "kind=rule"]
    command += [f"function={function}", f"output={tmp_path}/scores"]

    def judged() -> list[str]:
        return [line for line in noted(tmp_path) if line.startswith("judged")]

    def started(until: int) -> "subprocess.Popen[str]":
        """The stage, when it is at a judgement of that number, and waits."""
        last.write_text(str(until))
        stage = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
        wait_until(lambda: len(judged()) == until)
        return stage

    first = started(6)
    (at_work,) = processes(tmp_path)
    journals = ".scores.partial-*/state/judged-*.jsonl"
    wait_until(lambda: [path.read_bytes().count(b"\n") for path in tmp_path.glob(journals)] == [5])  # but the last
    first.kill()
    first.communicate()
    (journal,) = tmp_path.glob(journals)
    wait_until(lambda: not is_alive(at_work))  # it has ended with it
    journal.write_bytes(journal.read_bytes()[:-3])  # torn

    second = started(14)
    (tmp_path / "my_rule.py.broken").touch()
    last.write_text("1000")
    _, told = second.communicate(timeout=200)
    assert second.returncode == 2, told
    assert "ConnectionError: the judge is down" in told
    (tmp_path / "my_rule.py.broken").unlink()

    stopped = started(len(judged()) + 2)
    stopped.send_signal(signal.SIGTERM)
    last.write_text("1000")
    assert stopped.wait(timeout=200) == 128 + signal.SIGTERM

    ended = subprocess.run(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, check=False)
    assert ended.returncode == 0, ended.stderr
    assert Artifact.open(tmp_path / "scores").manifest.digest == whole.manifest.digest
    repeated = len(judged()) - len(set(judged()))
    assert repeated <= 3, "the one in hand at the kill, the torn one, and the one that failed"
    assert not list(tmp_path.glob(".scores*"))


SEES_BEATS = """
attempt = pathlib.Path('ATTEMPT')

def wait(condition):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found

def latest():
    return (attempt / "heartbeat").stat().st_mtime_ns

def progress():
    text = (attempt / "progress.json").read_text()
    return text if '"within"' in text and '"done": 0, "total": 6' not in text else ""

def judge(**others):
    first = latest()
    second = wait(lambda: latest() > first and latest())
    wait(lambda: latest() > second)
    note("two beats")
    try:
        os.mkdir(attempt / "one")
    except FileExistsError:
        return 1
    note("told " + wait(progress))
    return 1
"""


def test_every_judgement_is_a_heartbeat(tmp_path: Path, answers: Artifact) -> None:
    """Also one that takes longer than a stage may be silent, within its own limit: here until it has seen two beats,
    or, one of them, until the judgements of the others are told."""
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    function = write(tmp_path, SEES_BEATS.replace("ATTEMPT", str(attempt)))
    environment = {**os.environ, "RATCHET_ATTEMPT": str(attempt), STALL: "1"}
    command = [sys.executable, "-m", "annotation", "score", f"rollouts={answers.path}", "kind=rule", "replicas=6"]
    command += [f"function={function}", f"output={tmp_path}/scores", "seconds_per_sample=100"]
    stage = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    assert stage.returncode == 0
    assert progress_of(attempt) == "1/1 shards"
    said = noted(tmp_path)
    assert said.count("two beats") == 6, said
    (told,) = [json.loads(text.removeprefix("told ")) for text in said if text.startswith("told ")]
    assert (told["done"], told["total"], told["within"]["total"]) == (0, 1, 6)


def test_a_function_may_reward_every_token(tmp_path: Path, answers: Artifact) -> None:
    function = write(tmp_path, "def judge(response_ids, **others):\n    return [0.5 * token for token in response_ids]")
    scores = score(tmp_path, answers, function, missing_eos_penalty=1.0)
    rows = [(row.prompt_id, each) for row in answers.rows(Rollout) for each in row.completions]
    for found, (prompt, completion) in zip(scores.rows(Score), rows, strict=True):
        expected = [0.5 * token for token in completion.response_ids]
        expected[-1] -= completion.finish_reason == "length"
        assert (found.prompt_id, found.sample) == (prompt, completion.sample)
        assert found.token_rewards == tuple(expected)
        assert found.score == pytest.approx(sum(expected))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("[1.0]", r"returned 1 numbers for prompt .*, which has \d+ response_ids; return one for each"),
        ("['a'] * len(response_ids)", "returned a list for prompt .* that holds something else than finite numbers"),
        ("[float('nan')] * len(response_ids)", "holds something else than finite numbers"),
    ],
)
def test_rewards_of_tokens_that_are_none(made: str, message: str, tmp_path: Path, answers: Artifact) -> None:
    function = write(tmp_path, f"def judge(response_ids, **others):\n    return {made}")
    with pytest.raises(UserError, match=message):
        score(tmp_path, answers, function)
