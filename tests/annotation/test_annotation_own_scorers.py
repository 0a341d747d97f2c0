"""A user's own scorers beyond a function of one answer: many at once, classes, async, parts and extras."""

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
from annotation_world import make_rollout, publish_rollouts

from annotation.samples import Sample
from annotation.scorers import score_config
from annotation.stages.score import SCORE
from annotation.workers.journal import Journal
from annotation.workers.worker import AnswerInput, DetailedScore, Failed, TokenRewards, convert_result
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.records import Rollout, Score
from contracts.stage import run_stage

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
        "opened with the settings",
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
        re.escape("scored prompt") + r" \w+, sample 0 twice with different results: 1.0 with {'of': 2.0}, then 9.0 with"
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
