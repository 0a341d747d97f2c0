"""A user's own scorers beyond a function of one answer: many at once, classes, async, parts and extras."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
import torch
from annotation_world import make_rollout, publish, publish_rollouts

from annotation.config import RlhflowImportConfig
from annotation.samples import Sample
from annotation.scorers import score_config
from annotation.stages.rlhflow import RLHFLOW_IMPORT
from annotation.stages.score import SCORE
from annotation.workers.journal import Journal
from annotation.workers.worker import AnswerInput, DetailedScore, Failed, TokenRewards, convert_result
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.prompts import PromptsConfig
from contracts.records import PROMPTS, ROLLOUTS, Message, Prompt, Rollout, Score
from contracts.stage import run_stage
from contracts.stages.prompts import IMPORT_PROMPTS

TEXTS = [["good .", "great ."], ["awful .", "bad ."], ["blue long .", "long"], ["good", "film ."]]


@pytest.fixture
def answers(tmp_path: Path) -> Artifact:
    """One shard: four prompts with two answers."""
    rollouts = [make_rollout(number, pair) for number, pair in enumerate(TEXTS)]
    return publish_rollouts(tmp_path / "rollouts", rollouts, shard=8)


def scored(tmp_path: Path, answers: Artifact, text: str, output: str = "scores", **keys: Any) -> Artifact:
    (tmp_path / "mine.py").write_text(text)
    fields = {"output": tmp_path / output, "rollouts": answers.path, "function": f"{tmp_path}/mine.py:judge"}
    made = run_stage(SCORE, score_config(kind="rule", **fields, **keys))
    assert made is not None
    return made


def scores(made: Artifact) -> list[float]:
    return [row.score for row in made.rows(Score)]


LENGTHS = [float(len(text)) for pair in TEXTS for text in pair]
FORMS = {
    "batch": "def judge(samples, times=1):\n    return [times * len(one.response) for one in samples]",
    "class": (
        "class judge:\n    def __init__(self, times=1):\n        self.times = times\n"
        "    def __call__(self, samples):\n        return tuple(self.times * len(one.response) for one in samples)"
    ),
    "class of one": (
        "class judge:\n    def __init__(self, times=1):\n        self.times = times\n"
        "    def __call__(self, *, response, **others):\n        return self.times * len(response)"
    ),
    "async class": (
        "import asyncio\nclass judge:\n    def __init__(self, *, times=1):\n        self.times = times\n"
        "        self.lock = asyncio.Lock()\n"
        "    async def __call__(self, samples):\n        async with self.lock:\n            await asyncio.sleep(0)\n"
        "        return [self.times * len(one.response) for one in samples]"
    ),
    "async": (
        "import asyncio\nasync def judge(*, response, times=1, **others):\n    await asyncio.sleep(0)\n"
        "    return times * len(response)"
    ),
    "object": (
        "class Judge:\n    async def __call__(self, samples, times=1):\n"
        "        return [times * len(one.response) for one in samples]\njudge = Judge()"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_scorer_with_settings(tmp_path: Path, answers: Artifact, form: str) -> None:
    made = scored(tmp_path, answers, FORMS[form], settings={"times": 2}, batch=3)
    assert scores(made) == [2 * length for length in LENGTHS]


def test_calls_of_an_async_function_are_under_way_together(tmp_path: Path, answers: Artifact) -> None:
    """It waits until four others have begun, so one after another would never end."""
    text = (
        "import asyncio\nbegun, most = 0, 0\n"
        "async def judge(*, response, **others):\n    global begun\n    begun += 1\n"
        "    while begun % 4:\n        await asyncio.sleep(0.001)\n    return 1"
    )
    assert scores(scored(tmp_path, answers, text, batch=4, seconds_per_sample=10)) == [1.0] * 8


def test_a_batch_is_given_what_is_known_of_answers(tmp_path: Path, answers: Artifact) -> None:
    text = (
        "def judge(samples):\n    return [\n        {'score': len(one.response_ids), 'extras_of': [one.prompt_id,"
        " one.sample, one.finish_reason, one.answer, one.tags, one.tools, one.messages[-1]['content']]}\n"
        "        for one in samples]"
    )
    found = list(scored(tmp_path, answers, text).rows(Score))
    rows = [(row, one) for row in answers.rows(Rollout) for one in row.completions]
    for score, (row, one) in zip(found, rows, strict=True):
        told = [row.prompt_id, one.sample, one.finish_reason, row.answer, [], None, row.messages[-1].content]
        assert score.extras == {"extras_of": told}
        assert score.score == len(one.response_ids)


def test_parts_and_extras_are_stored_and_their_means_are_facts(tmp_path: Path, answers: Artifact) -> None:
    """A part that some samples lack has its mean over those that have it."""
    text = (
        "def judge(*, response, **others):\n    if response == 'bad .':\n        return None\n"
        "    return {'score': 1, 'words': len(response.split()), 'stops': '.' in response or None,"
        " 'seen': response, 'deep': {'a': [1, None]}}"
    )
    made = scored(tmp_path, answers, text, max_dropped=0.2)
    found = {(row.prompt_id, row.sample): row for row in made.rows(Score)}
    first = next(answers.rows(Rollout))
    row = found[first.prompt_id, 0]
    assert row.parts == {"words": 2.0, "stops": 1.0}
    assert row.extras == {"seen": "good .", "deep": {"a": [1, None]}}
    facts = made.manifest.facts
    words = [len(text.split()) for pair in TEXTS for text in pair if text != "bad ."]
    assert facts["words_mean"] == pytest.approx(sum(words) / 7)
    assert facts["stops_mean"] == 1.0
    assert "part_sums" not in facts
    assert made.manifest.ledger.dropped == {"unscored": 1}


def test_scores_without_parts_are_written_as_ever(tmp_path: Path, answers: Artifact) -> None:
    made = scored(tmp_path, answers, "def judge(**others):\n    return 1")
    line = made.shards[0].read_bytes().splitlines()[0]
    assert list(msgspec.json.decode(line)) == ["prompt_id", "sample", "score", "token_logprobs", "token_values"]


WRONG = {
    "return [1] * (len(samples) + 1)": r"returned 4 results for a batch of 3 answers with .*, sample 0; return one for",
    "return 1": r"returned 1 for a batch of 3 answers with .*; return a list with one result for each",
    "return {one: 1 for one in 'abc'}": r"returned \{'a': 1, .* for a batch of 3 answers with .*; return a list",
    "raise ValueError('no')": r"failed on a batch of 3 answers with .*, sample 0: ValueError: no \(.*mine.py, line 2\)",
    "from contracts.errors import UserError; raise UserError('a key lacks.')": r".*, sample 0: a key lacks\.$",
    "import json; json.loads('no')": r", sample 0: JSONDecodeError: .* \(char 0\) \(.*mine.py, line 2\)",
    "return [1, float('nan'), 1]": r"gave nan for .*, sample 1",
    "return [1, 'one', 1]": r"returned 'one' for .*, sample 1; return a number",
    "return [1, {'words': 2}, 1]": r"returned a mapping without 'score' for .*, sample 1; it has 'words'",
    "return [1, {'score': 1, 'x': float('inf')}, 1]": r"gave inf as x for .*, sample 1. Numbers must be finite",
    "return [1, {'score': 1, 'a b': 1}, 1]": r"returned a value named 'a b' for .*, sample 1; names are",
    "return [1, {'score': 1, 'x': object()}, 1]": r"returned what cannot be written as JSON for .*, sample 1",
    "return [1, {'score': 1, 'x': 'y' * 70000}, 1]": r"returned 700.. bytes of further results for .*, sample 1; at",
    "return [1, {'score': {'score': 1}}, 1]": r"returned a mapping as score for .*, sample 1",
    "import os; os._exit(3)": r"ended its process on a batch of 3 answers with .*, sample 0: it left with exit code 3",
}


@pytest.mark.parametrize("end", WRONG)
def test_what_is_wrong_with_a_result_is_told(tmp_path: Path, answers: Artifact, end: str) -> None:
    with pytest.raises(UserError, match=WRONG[end]):
        scored(tmp_path, answers, f"def judge(samples):\n    {end}", batch=3)


def test_numbers_of_arrays_are_numbers() -> None:
    """Those without dimensions, of whichever library; an array with one is none."""
    one = AnswerInput([], "", "stop", None, [], None, [5, 6], "p", 0)
    for number in (numpy.float32(0.5), numpy.array(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)):
        assert convert_result(number, one, tokens=False) == 0.5
        assert convert_result({"score": number, "part": number}, one, tokens=False) == DetailedScore(
            0.5, {"part": 0.5}, {}
        )
        assert convert_result([number, 1], one, tokens=True) == TokenRewards([0.5, 1.0])
    assert convert_result(numpy.bool_(True), one, tokens=False) == 1.0
    for wrong in (torch.tensor([0.5]), torch.tensor(1j), numpy.array("one")):
        found = convert_result(wrong, one, tokens=False)
        assert isinstance(found, Failed)
        assert found.after.startswith("; return a number")
    assert isinstance(convert_result(torch.tensor(float("nan")), one, tokens=False), Failed)


def test_a_batch_that_fails_is_counted_as_a_whole(tmp_path: Path, answers: Artifact) -> None:
    """It takes no other one with it."""
    text = (
        "import os\ndef judge(samples):\n    if any(one.response == 'bad .' for one in samples):\n        os._exit(1)\n"
        "    return [1 for one in samples]"
    )
    made = scored(tmp_path, answers, text, batch=3, fail_on_error=0.5)
    assert made.manifest.ledger.dropped == {"failed": 3}
    assert "a batch of 3 answers with prompt" in made.manifest.facts["failures"][0]


REFUSED = [
    (
        "class judge:\n    def __init__(self, model): ...\n    def __call__(self, samples): ...",
        "instantiated with the settings",
    ),
    ("class judge:\n    def __init__(self): ...", r"cannot be called: give it a method __call__"),
    (
        "class judge:\n    def __call__(self, prompts): ...",
        r"__call__ takes \(prompts\), but is called with the keywords",
    ),
    ("def judge(samples, scale): ...", r"takes \(samples, scale\), but is called with the keywords samples: missing"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_cannot_be_opened_or_called_is_refused(tmp_path: Path, answers: Artifact, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scored(tmp_path, answers, text, fail_on_error=0.9)


def test_settings_may_not_take_the_place_of_what_a_call_is_given(tmp_path: Path, answers: Artifact) -> None:
    with pytest.raises(UserError, match="settings has 'response', which every call is given"):
        scored(tmp_path, answers, "def judge(**others): ...", settings={"response": "x"})


def test_settings_and_batch_enter_the_key_where_they_are_set(tmp_path: Path, answers: Artifact) -> None:
    text = "def judge(samples, by=1):\n    return [by for one in samples]"
    plain = scored(tmp_path, answers, text, "one").manifest.key_parts["config"]
    assert not {"settings", "batch"} & plain.keys()
    other = scored(tmp_path, answers, text, "two", settings={"by": 2}, batch=2).manifest.key_parts["config"]
    assert (other["settings"], other["batch"]) == ({"by": 2}, 2)


def test_a_scorer_that_differs_between_calls_is_told(tmp_path: Path, answers: Artifact) -> None:
    text = "calls = 0\ndef judge(**others):\n    global calls\n    calls += 1\n    return {'score': calls, 'of': 2}"
    found = (
        re.escape("scored prompt")
        + r" \w+ \(\".*\"\), sample 0 twice with different results: 1.0 with {'of': 2.0}, then 9.0 with"
    )
    with pytest.raises(UserError, match=found):
        scored(tmp_path, answers, text, judge_twice=2)
    assert (
        scores(scored(tmp_path, answers, "def judge(samples):\n    return [2] * len(samples)", judge_twice=2))
        == [2] * 8
    )


def test_a_batch_that_was_cut_short_is_judged_again_as_a_whole(tmp_path: Path, answers: Artifact) -> None:
    """So the batches are always the same, whatever a kill has left: of two that were, one answer here and all there."""
    publication = tmp_path / "state"
    publication.mkdir()
    samples = [Sample(row, one) for row in answers.rows(Rollout) for one in row.completions]
    Journal(publication, samples).add({0: 7.0, 3: DetailedScore(8.0, {}, {}), 4: 8.0, 5: None})
    text = (
        "def judge(samples):\n    open(__file__ + '.log', 'a').write(f'{len(samples)}\\n')\n"
        "    return [1 for one in samples]"
    )
    (tmp_path / "mine.py").write_text(text)
    config = score_config(
        kind="rule", output=tmp_path / "scores", rollouts=answers.path, function=f"{tmp_path}/mine.py:judge", batch=3
    )
    from annotation.scorers.base import Opening
    from annotation.workers.rule import Rule

    found = Rule(config, Opening(publication, lambda: 8))(samples)  # type: ignore[arg-type]
    assert [one if isinstance(one, str) else one.score for one in found] == [1, 1, 1, 8, 8, "unscored", 1, 1]  # type: ignore[union-attr]
    assert (tmp_path / "mine.py.log").read_text().split() == ["3", "2"]


HANGING = """
import asyncio, pathlib, sys
from annotation.workers.worker import _set_up_process

async def ask():
    await asyncio.Event().wait()

async def judge():
    await ask()

async def all_of_them():
    asyncio.get_running_loop().call_later(0.1, pathlib.Path(sys.argv[1]).touch)  # when both wait
    await asyncio.gather(judge(), judge())

_set_up_process()
asyncio.run(all_of_them())
"""


def test_a_stack_dump_shows_where_coroutines_wait(tmp_path: Path) -> None:
    """Not the event loop alone, in which every async function stands that hangs."""
    path, waits, root = tmp_path / "hanging.py", tmp_path / "waits", Path(__file__).parents[2]
    path.write_text(HANGING)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(path), str(waits)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            while not waits.exists():
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGQUIT)
            assert process.stderr is not None
            said = ""
            while "in judge" not in said and (line := process.stderr.readline()):
                said += line
        finally:
            process.kill()
    where = f'  File "{path}", line 6 in ask\n  File "{path}", line 9 in judge\n'
    assert re.search(r"Coroutines that wait here: 2 \(most recent call first\):\n.*\n" + re.escape(where), said)


CLOSED = """
import asyncio, os, pathlib, time

HERE = pathlib.Path(__file__).parent

def wait_for(name):
    while not (HERE / name).exists():
        time.sleep(0.01)

class judge:
    def __init__(self):
        (HERE / f"opened-{os.getpid()}").touch()

    CALL

    CLOSE
"""
NOTE = '(HERE / f"closed-{os.getpid()}").touch()'
CLOSES = {
    "sync": f"def close(self): {NOTE}",
    "async": f"async def close(self):\n        await asyncio.sleep(0)\n        {NOTE}",
}
ONE = "def __call__(self, *, response, **others): "
MANY = "async def __call__(self, samples): "


def own_class(call: str, close: str) -> str:
    return CLOSED.replace("CALL", call).replace("CLOSE", close)


def opened_and_closed(folder: Path) -> tuple[set[str], set[str]]:
    """The processes that have opened a scorer, and those that have closed one."""
    return tuple({path.name.partition("-")[2] for path in folder.glob(f"{what}-*")} for what in ("opened", "closed"))  # type: ignore[return-value]


@pytest.mark.parametrize("close", CLOSES)
@pytest.mark.parametrize("call", [f"{ONE} return 1", f"{MANY} return [1] * len(samples)"], ids=["one", "many"])
def test_a_class_is_closed_when_its_stage_is_finished(tmp_path: Path, answers: Artifact, call: str, close: str) -> None:
    """Before the stage publishes: nothing of it outlives the stage."""
    assert scores(scored(tmp_path, answers, own_class(call, CLOSES[close]), replicas=2)) == [1.0] * 8
    opened, closed = opened_and_closed(tmp_path)
    assert opened
    assert closed == opened


@pytest.mark.parametrize("close", CLOSES)
def test_a_class_is_closed_where_another_response_fails(tmp_path: Path, answers: Artifact, close: str) -> None:
    """Also in a process that is in the middle of a call, which is interrupted."""
    call = (
        f"{ONE}\n        if response == 'good .':\n            wait_for('hangs')\n            raise ValueError('no')\n"
        "        (HERE / 'hangs').touch()\n        time.sleep(1000)"
    )
    with pytest.raises(UserError, match=r"sample 0: ValueError: no"):
        scored(tmp_path, answers, own_class(call, CLOSES[close]), replicas=2)
    opened, closed = opened_and_closed(tmp_path)
    assert len(opened) == 2
    assert closed == opened


@pytest.mark.parametrize("call", [f"{ONE} time.sleep(1000)", f"{MANY} await asyncio.sleep(1000)"], ids=["one", "many"])
def test_a_class_whose_call_takes_too_long_is_closed(tmp_path: Path, answers: Artifact, call: str) -> None:
    with pytest.raises(UserError, match=r"has not scored .* after .* s, and was killed"):
        scored(tmp_path, answers, own_class(call, CLOSES["async"]), seconds_per_sample=0.5, batch=1)
    opened, closed = opened_and_closed(tmp_path)
    assert len(opened) == 1
    assert closed == opened


def test_an_exception_in_close_is_logged_and_changes_nothing(
    tmp_path: Path, answers: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    close = "async def close(self): raise OSError('gone')"
    assert scores(scored(tmp_path, answers, own_class(f"{ONE} return 1", close))) == [1.0] * 8
    said = capfd.readouterr().err
    assert re.search(
        rf"class '{tmp_path}/mine.py:judge': close\(\) failed: OSError: gone \(.*mine.py, line \d+\)", said
    )


def test_a_close_that_hangs_is_ended(
    tmp_path: Path, answers: Artifact, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("annotation.workers.process.CLOSE_SECONDS", 0.5)
    made = scored(tmp_path, answers, own_class(f"{ONE} return 1", "def close(self): time.sleep(1000)"))
    assert scores(made) == [1.0] * 8
    said = capfd.readouterr().err
    assert "was not closed after 0.5 s, and its process is killed" in said
    assert "in close" in said, "the stack dump"


@pytest.mark.parametrize("grace", ["0.1", "60"])
def test_a_class_is_closed_when_the_stage_is_asked_to_stop(tmp_path: Path, answers: Artifact, grace: str) -> None:
    """After the call in hand where that ends in time, which a file decides here; else the call is interrupted."""
    (tmp_path / "mine.py").write_text(
        own_class(f"{ONE}\n        (HERE / 'called').touch()\n        wait_for('go')\n        return 1", CLOSES["sync"])
    )
    fields = {"output": tmp_path / "scores", "rollouts": answers.path, "function": f"{tmp_path}/mine.py:judge"}
    command = [
        sys.executable,
        "-m",
        "annotation",
        "score",
        "kind=rule",
        *(f"{key}={value}" for key, value in fields.items()),
    ]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, env={**os.environ, "RATCHET_GRACE_SECONDS": grace}) as process:
        while not (tmp_path / "called").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        if grace == "60":
            (tmp_path / "go").touch()
        assert process.wait(300) == 128 + signal.SIGTERM
    opened, closed = opened_and_closed(tmp_path)
    assert len(opened) == 1
    assert closed == opened


FAILS = """def judge(*, messages, **others):
    if 'long' in messages[-1]['content']: raise ValueError('no')
    return 1"""


@pytest.mark.parametrize("through", ["prompts", "rlhflow"])
def test_a_failure_names_the_prompt_as_its_author_knows_it(
    tmp_path: Path, models: dict[str, Path], through: str
) -> None:
    """By its first words, and by file and line where it was imported from, also through a draw of several sets."""
    source = tmp_path / "mine.jsonl"
    asked = ["review the film", "review the long film", "review the book"]
    source.write_text("".join(json.dumps({"prompt": each, "responses": ["good ."]}) + "\n" for each in asked))
    if through == "prompts":
        settings = PromptsConfig(source=source, output=tmp_path / "prompts", columns={"answer": None})
        prompts = run_stage(IMPORT_PROMPTS, settings)
        assert prompts is not None
        taken = [make_rollout(number, ["good ."]) for number in range(3)]
        rows = [
            msgspec.structs.replace(rollout, prompt_id=prompt.prompt_id, messages=prompt.messages)
            for rollout, prompt in zip(taken, prompts.rows(Prompt), strict=True)
        ]
        drawn = publish(
            tmp_path / "drawn", PROMPTS, [[*prompts.rows(Prompt)]], input_paths={"sources.a": str(prompts.path)}
        )
        answers = publish(tmp_path / "rollouts", ROLLOUTS, [rows], input_paths={"prompts": str(drawn.path)})
    else:
        config = RlhflowImportConfig(source=source, output=tmp_path / "rollouts", tokenizer=models["causal"])
        made = run_stage(RLHFLOW_IMPORT, config)
        assert made is not None
        answers = made
    with pytest.raises(UserError) as told:
        scored(tmp_path, answers, FAILS)
    assert re.search(
        r'failed on prompt [0-9a-f]{16} \("review the long film"\), sample 0: ValueError: no', str(told.value)
    )
    assert str(told.value).endswith(f" The prompt is {source}, line 2.")
    source.unlink()
    with pytest.raises(UserError, match=r"ValueError: no \(.*mine.py, line 2\)\.$"):
        scored(tmp_path, answers, FAILS, output="again")


def test_long_prompts_are_shortened_in_messages() -> None:
    rollout = make_rollout(0, ["good ."])
    asked = Message("user", "What\n is   this? " * 40)
    sample = Sample(
        msgspec.structs.replace(rollout, messages=(asked, Message("assistant", "It"))), rollout.completions[0]
    )
    shown = "What is this? " * 5
    assert str(sample) == f'prompt {rollout.prompt_id} ("{shown[:60]}..."), sample 0'
