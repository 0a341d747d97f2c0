"""The kinds of scorers that ship and judge without a model: what each says of an answer."""

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from annotation_world import make_rollout, publish_rollouts

from annotation.sandbox.process import namespaces_error
from annotation.scorers import score_config
from annotation.scorers.base import WorkerSettings
from annotation.stages.score import SCORE
from contracts.artifacts import Artifact
from contracts.declaration import load
from contracts.errors import UserError
from contracts.records import Score
from contracts.stage import run_stage


def says(kind: str, response: str, answer: str | None = None, tokens: int = 0, **keys: Any) -> Any:
    """What a kind's function says of one answer."""
    config = score_config(output=Path("x"), rollouts=Path("y"), kind=kind, **keys)
    assert isinstance(config, WorkerSettings)
    judge = load(config.target)
    given = {
        "messages": [], "response": response, "finish_reason": "stop", "answer": answer, "response_ids": [1] * tokens
    }  # fmt: skip
    return judge(**config.keywords)(**given) if inspect.isclass(judge) else judge(**given, **config.keywords)


def score_of(*arguments: Any, **keys: Any) -> Any:
    found = says(*arguments, **keys)
    return found["score"] if isinstance(found, dict) else found


@pytest.mark.parametrize(
    ("words", "keys", "score"),
    [
        (5, {"low": 5, "high": 5}, 1.0),
        (4, {"low": 5}, 0.0),
        (4, {"low": 6, "margin": 4}, 0.5),
        (30, {"high": 20, "margin": 20}, 0.5),
        (100, {"high": 20, "margin": 20}, 0.0),
        (100, {"low": 3}, 1.0),
    ],
)
def test_length(words: int, keys: dict[str, Any], score: float) -> None:
    assert says("length", " ".join(["word"] * words), unit="words", **keys) == {"score": score, "length": words}
    assert says("length", "", tokens=words, **keys) == {"score": score, "length": words}


THOUGHT = "<think>...</think><answer>...</answer>"


@pytest.mark.parametrize(
    ("response", "template", "score", "tags"),
    [
        ("<think>a\nb</think>\n <answer>42</answer>\n", THOUGHT, 1.0, 1.0),
        ("<think>a</think>42", THOUGHT, 0.0, 0.5),
        ("<think>a</think><answer>1</answer><answer>2</answer>", THOUGHT, 0.0, 0.5),
        ("first <think>a</think><answer>1</answer>", THOUGHT, 0.0, 1.0),
        ("a</think><answer>1</answer>", "...</think><answer>...</answer>", 1.0, 1.0),
        ("Reason:  a\nSo: b", "Reason: ... So: ...", 1.0, 1.0),
        ("Reason a", "Reason: ...", 0.0, 0.0),
    ],
)
def test_format(response: str, template: str, score: float, tags: float) -> None:
    assert says("format", response, template=template) == {"score": score, "tags": tags}


def test_regex() -> None:
    assert says("regex", "it is 42.", pattern=r"\d+") == {"score": 1.0, "matched": "42"}
    assert says("regex", "it is 42.", pattern=r"\d+", match="whole", absent=-1) == {"score": -1.0}
    assert says("regex", "it is 42.", pattern=r"(?P<number>\d)(?P<score>\d)") == {"score": 1.0, "number": "4"}


def test_keywords() -> None:
    keys: dict[str, Any] = {"required": ["New York", "sun"], "forbidden": ["rain"]}
    assert score_of("keywords", "The SUN over new\nyork", **keys) == 1.0
    assert score_of("keywords", "The sunny New York", **keys) == 0.5
    assert score_of("keywords", "The sunny New York", whole_words=False, **keys) == 1.0
    assert score_of("keywords", "the sun over new york", case=True, **keys) == 0.5
    found = says("keywords", "rain over New York", **keys)
    assert found == {"score": 0.0, "required": 0.5, "forbidden": 1, "missing": ["sun"], "said": ["rain"]}


@pytest.mark.parametrize(
    ("response", "answer", "keys", "score"),
    [
        (" Paris\n", "paris", {}, 1.0),
        ("Paris.", "paris", {}, 0.0),
        ("The Paris!", "paris", {"ignore": ["case", "blanks", "punctuation", "articles"]}, 1.0),
        ("$1,000.00", "1000", {}, 1.0),
        ("1000", "1,000", {"numbers": False}, 0.0),
        ("first 3, then #### 4", "so\n#### 4", {"extract": "#### (.*)", "extract_answer": "#### (.*)"}, 1.0),
        ("4", "#### 4", {"extract": "#### (.*)", "extract_answer": "#### (.*)"}, 0.0),
        ("nan", "nan", {}, 1.0),
        ("nan", "inf", {}, 0.0),
        ("cafe\u0301", "caf\u00e9", {"ignore": []}, 1.0),
        ("\uff30\uff21ris", "paris", {}, 1.0),
        ("\uff11\uff0c\uff10\uff10\uff10", "1000", {}, 1.0),
        ("10\u00b2", "102", {}, 0.0),
        ("10\u00b2 e\u0301", "10\u00b2 \u00e9", {}, 1.0),
        ("3\u00bd", "31\u20442", {}, 0.0),
    ],
)
def test_exact_match(response: str, answer: str, keys: dict[str, Any], score: float) -> None:
    assert score_of("exact_match", response, answer, **keys) == score


def test_without_a_known_answer_there_is_no_judgement() -> None:
    assert says("exact_match", "4") is None
    assert says("exact_match", "4", "4", extract_answer="#### (.*)") is None
    assert says("json_schema", "{}") is None
    assert says("math", "4") is None
    assert says("code", "4", isolation="limits") is None


def test_json_schema() -> None:
    shape = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    assert says("json_schema", '{"age": 3}', definition=shape) == {"score": 1.0, "parses": 1.0, "wrong": None}
    assert says("json_schema", 'Here:\n```json\n{"age": 3}\n```', json.dumps(shape))["score"] == 1.0
    found = says("json_schema", '{"age": "3"}', definition=shape)
    assert found == {"score": 0.0, "parses": 1.0, "wrong": "$.age: '3' is not of type 'integer'"}
    assert says("json_schema", '{"age": 3', definition=shape)["parses"] == 0.0
    assert says("json_schema", "[" * 100_000, definition=shape)["parses"] == 0.0
    with pytest.raises(UserError, match=r"definition is not a JSON Schema: \$.type: 'thing' is not valid"):
        score_config(output=Path("x"), rollouts=Path("y"), kind="json_schema", definition={"type": "thing"}).check()


def test_repetition() -> None:
    assert says("repetition", "a b c d e") == 0.0
    assert says("repetition", "one two") == 0.0
    assert says("repetition", "so so so so so", weight=2.0) == pytest.approx(-2 * 2 / 3)
    assert says("repetition", "", tokens=10, unit="tokens") == pytest.approx(-7 / 8)


def test_language() -> None:
    german = "Das ist ein ganz gewöhnlicher Satz über das Wetter von gestern."
    assert says("language", german, language="de") == {"score": pytest.approx(1.0, abs=0.01), "seen": "de"}
    assert score_of("language", german, language="en", among=["de", "en", "fr"]) < 0.01
    assert says("language", "42!", language="de") is None
    with pytest.raises(UserError, match=r"knows no language 'xx'. Known: .*, de, "):
        score_config(output=Path("x"), rollouts=Path("y"), kind="language", language="xx").check()


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        (r"So the result is $\frac{1}{2}$.", "0.5", 1.0),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        ("The answer is 72.", "They sold 48+24.\n#### 72", 1.0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        (r"\boxed{\{1, 2\}}", r"$\{2, 1\}$", 1.0),
        (r"\boxed{3}", "4", 0.0),
        ("I do not know.", "4", 0.0),
        (r"\boxed{" * 50, "4", 0.0),
    ],
)
def test_math(response: str, answer: str, score: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)  # not of this process
    keys = {"extract_answer": "#### (.*)"} if "####" in answer else {}
    assert score_of("math", response, answer, **keys) == score


REFUSED = [
    ({"kind": "regex", "pattern": "("}, "not a regular expression: missing )"),
    ({"kind": "exact_match", "extract": "["}, "not a regular expression: unterminated character set"),
    ({"kind": "length", "low": 3, "high": 2}, "high=2 is below low=3"),
    ({"kind": "keywords"}, "required and forbidden are both empty"),
    ({"kind": "language", "language": "English"}, "write an ISO 639 code in small letters"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_settings_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        score_config(output=Path("x"), rollouts=Path("y"), **keys)
    assert message in str(caught.value)


def scored(tmp_path: Path, texts: list[str], **keys: Any) -> Artifact:
    """Answers of one prompt, whose known answer is `great`, in processes as a run has them."""
    rollouts = publish_rollouts(tmp_path / "rollouts", [make_rollout(1, texts)])
    made = run_stage(SCORE, score_config(output=tmp_path / "scores", rollouts=rollouts.path, **keys))
    assert made is not None
    return made


def test_kinds_run_like_any_scorer(tmp_path: Path) -> None:
    """With parts among the facts, a penalty, a key of their settings."""
    made = scored(tmp_path, ["great", "good ."], kind="exact_match", ignore=["case"], missing_eos_penalty=0.5)
    assert [(row.score, row.extras) for row in made.rows(Score)] == [
        (0.5, {"extracted": "great"}),
        (0.0, {"extracted": "good ."}),
    ]
    assert (
        made.manifest.key_parts["config"] | {"ignore": ["case"], "kind": "exact_match"}
        == made.manifest.key_parts["config"]
    )
    assert "function" not in made.manifest.key_parts["config"]


@pytest.mark.parametrize("kind", ["code", "exact_match", "json_schema", "math"])
def test_prompts_without_an_answer_are_told_as_such(tmp_path: Path, kind: str) -> None:
    """Under a reason of their own, with the key that names the column."""
    rollout = msgspec.structs.replace(make_rollout(1, ["great", "good ."]), answer=None)
    rollouts = publish_rollouts(tmp_path / "rollouts", [rollout])
    config = score_config(output=tmp_path / "scores", rollouts=rollouts.path, kind=kind)
    with pytest.raises(UserError) as caught:
        run_stage(SCORE, config)
    assert "2 samples in = 0 kept + 2 no_answer is more than max_dropped=0.1 allows" in str(caught.value)
    assert f"kind={kind} needs the prompt's known `answer`" in str(caught.value)
    assert "answer_column=COLUMN" in str(caught.value)


def test_what_is_not_read_out_of_an_answer_is_not_called_missing(tmp_path: Path) -> None:
    made = scored(tmp_path, ["great"], kind="exact_match", extract_answer="#### (.*)", max_dropped=1.0)
    assert made.manifest.ledger.dropped == {"unscored": 1}


def test_a_regular_expression_without_end_is_ended(tmp_path: Path) -> None:
    """It fails on its answer alone."""
    words = " ".join(["long"] * 12)
    pattern = r"((\w+\s?)+)+[xyz]"
    made = scored(
        tmp_path, [f"{words} .", "good ."], kind="regex", pattern=pattern, seconds_per_sample=1.0,
        fail_on_error=0.5,
    )  # fmt: skip
    assert made.manifest.ledger.dropped == {"failed": 1}
    assert [row.score for row in made.rows(Score)] == [0.0]
    (message,) = made.manifest.facts["failures"]
    assert message.startswith(f"UserError: kind=regex (pattern={pattern}) has not scored prompt ")


def test_a_message_names_what_is_no_default() -> None:
    config = score_config(output=Path("x"), rollouts=Path("y"), kind="exact_match", extract="a" * 500)
    assert isinstance(config, WorkerSettings)
    assert config.title == f"kind=exact_match (extract={'a' * 292}...)"
    config = score_config(output=Path("x"), rollouts=Path("y"), kind="repetition")
    assert isinstance(config, WorkerSettings)
    assert config.title == "kind=repetition"


def saying(tmp_path: Path, texts: list[str], answer: str) -> Artifact:
    """Rollouts with one prompt and these answers, whatever they say."""
    rollout = make_rollout(1, ["good ."] * len(texts))
    completions = [
        msgspec.structs.replace(one, text=text) for one, text in zip(rollout.completions, texts, strict=True)
    ]
    changed = msgspec.structs.replace(rollout, completions=tuple(completions), answer=answer)
    return publish_rollouts(tmp_path / "saying", [changed])


@pytest.mark.slow
def test_mathematics_without_end_fails_alone(tmp_path: Path) -> None:
    """A tower of powers, by which no computer algebra comes to an end."""
    texts = [r"\boxed{5}", r"\boxed{9^{9^{9^{9^{9}}}}}", r"\boxed{10^{10^{10}}!}", r"\boxed{6 - 1}"]
    rollouts = saying(tmp_path, texts, "5")
    keys: dict[str, Any] = {"seconds_per_sample": 4.0, "fail_on_error": 0.5, "memory_gib": 1.0}
    made = run_stage(SCORE, score_config(output=tmp_path / "scores", rollouts=rollouts.path, kind="math", **keys))
    assert made is not None
    found = {row.sample: row.score for row in made.rows(Score)}
    assert (found[0], found[3]) == (1.0, 1.0)
    assert all(score == 0.0 for sample, score in found.items() if sample in (1, 2))
    assert made.manifest.ledger.kept + made.manifest.ledger.dropped.get("failed", 0) == 4
    assert made.manifest.facts["parsed_mean"] > 0


@pytest.mark.slow
@pytest.mark.skipif(namespaces_error() is not None, reason="the kernel gives no namespaces")
def test_programs_that_do_harm_have_a_score_and_harm_no_others(tmp_path: Path) -> None:
    right = "def add(a, b):\n    return a + b"
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    texts = [bomb, right, "while True: pass", f"import os\nos.kill(os.getppid(), 9)\n{right}", "not python", right]
    rollouts = saying(tmp_path, [f"```python\n{text}\n```" for text in texts], "assert add(1, 2) == 3")
    keys: dict[str, Any] = {"kind": "code", "seconds": 2.0, "replicas": 2}
    made = run_stage(SCORE, score_config(output=tmp_path / "scores", rollouts=rollouts.path, **keys))
    assert made is not None
    found = [(row.score, row.extras["ended"]) for row in made.rows(Score) if row.extras]
    assert [score for score, _ in found] == [0, 1, 0, 1, 0, 1]
    assert [ending.partition(":")[0] for _, ending in found] == [
        "ended after 2 s", "ok", "ended after 2 s", "ok", "exit code 1", "ok",
    ]  # fmt: skip
    assert made.manifest.facts["passed_mean"] == pytest.approx(3 / 6)


def test_only_those_that_use_a_library_have_it_in_their_key(tmp_path: Path) -> None:
    made = scored(tmp_path, ["good ."], kind="math", extract_answer=".*", max_dropped=1.0)
    assert "math-verify" in made.manifest.key_parts["versions"]
    assert "jsonschema" not in made.manifest.key_parts["versions"]
