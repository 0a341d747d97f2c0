"""Scores that are made of others: the expression, and the stage that joins and computes."""

import math
from pathlib import Path
from typing import Any

import pytest
from annotation_world import make_rollout, publish_rollouts
from hypothesis import given
from hypothesis import strategies as st

from annotation.scorers import score_config
from annotation.scorers.expression import Expression, cycle_in, overlong, rank, zscore
from annotation.stages.score import SCORE
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.joining import scorer_of
from contracts.records import Rollout, Score
from contracts.stage import run_stage


def computed(text: str, **columns: Any) -> list[float]:
    """Of one answer, or of those to a prompt."""
    lists = {name.replace("__", "."): value if isinstance(value, list) else [value] for name, value in columns.items()}
    return Expression(text).compute(lists, {"a": (10.0, 2.0)})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.7 * a + 0.3 * b - 0.001 * tokens", 0.7 * 3 + 0.3 * 2 - 0.1),
        ("-a + +b / 4", -2.5),
        ("a > 2 and b > 2", 0.0),
        ("a > 2 or b > 2", 1.0),
        ("not a", 0.0),
        ("1 < b < a", 1.0),
        ("1 < a < b", 0.0),
        ("a if truncated else b", 2.0),
        ("min(a, b, 1) + max(a, b) + abs(0 - a)", 7.0),
        ("clip(a, 0, 1.5)", 1.5),
        ("mean(a, b)", 2.5),
        ("lower_bound(2, a, b)", 1.5),
        ("a.part * 2", 10.0),
        ("standard(a)", -3.5),
        ("overlong(tokens, 120, 40) + 0 * a", -0.5),
        ("sigmoid(a - a)", 0.5),
        ("a == 3", 1.0),
        ("1 < a < 5", 1.0),
        ("5 > a > b > 1", 1.0),
        ("1 < a > 2", 1.0),
        ("a != b", 1.0),
        ("clip(a, 1, 1)", 1.0),
        ("clip(a, b, 1)", 1.0),
        ("lower_bound(0 - 1, a, b)", 3.0),
        ("a / (2 - 1)", 3.0),
    ],
)
def test_what_expressions_say(text: str, value: float) -> None:
    found = computed(text, a=3.0, b=2.0, tokens=100.0, truncated=0.0, a__part=5.0)
    assert found == [pytest.approx(value)]


@pytest.mark.parametrize(
    "text", ["a / b", "exp(1000 * a)", "log(b)", "sqrt(0 - a)", "a * 1e300 * 1e300 - a * 1e300 * 1e300"]
)
def test_what_cannot_be_computed_is_no_number(text: str) -> None:
    assert math.isnan(computed(text, a=3.0, b=0.0)[0])


@pytest.mark.parametrize(
    "text",
    [
        "max(a, a / b)", "min(1, a / b)", "lower_bound(1, a / b, a)", "not a / b", "a if a / b else b", "a / b > 1",
        "0 < a / b < 1", "a / b or a", "a / b and a", "b or a / b", "a > 0 and a / b",
        "lower_bound(1, a * 1e308 * 10, a)",
    ],
)  # fmt: skip
def test_what_is_computed_with_no_number_is_none_either(text: str) -> None:
    """Also where Python's `max` or a comparison would take it for one."""
    assert math.isnan(computed(text, a=3.0, b=0.0)[0])


@pytest.mark.parametrize(
    ("text", "value"), [("b > 0 and a / b > 1", 0), ("b == 0 or a / b > 1", 1), ("a / b if b > 0 else 7", 7)]
)
def test_what_a_condition_rules_out_is_not_missed(text: str, value: float) -> None:
    assert computed(text, a=3.0, b=0.0) == [value]


def test_an_answer_without_a_number_has_no_part_in_a_comparison() -> None:
    columns = {"a": [1.0, 2.0, 3.0], "b": [0.0, 1.0, 1.0]}
    for text, rest in (("rank(a / b)", [0, 1]), ("zscore(a / b)", [-math.sqrt(0.5), math.sqrt(0.5)])):
        first, *others = Expression(text).compute(columns, {})
        assert math.isnan(first)
        assert others == pytest.approx(rest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a +", "not an expression"),
        ("__import__('os')", "no function __import__"),
        ("a.b.c", "a.b.c is not allowed"),
        ("a.__class__()", "is not allowed"),
        ("a ** 9", r"a \*\* 9 is not allowed"),
        ("[a]", "is not allowed"),
        ("a if b else 'x'", "'x' is not allowed"),
        ("(lambda: a)()", "is not allowed"),
        ("a[0]", "is not allowed"),
        ("f'{a}'", "is not allowed"),
        ("min(a, key=b)", "is not allowed"),
        ("min(*a)", "is not allowed"),
        ("(b := a)", "is not allowed"),
        ("a in b", "is not allowed"),
        ("a // b", "is not allowed"),
        ("~a", "is not allowed"),
        ("True + a", "True is not allowed"),
        ("a + 1" + "0" * 400, "is too large"),
        ("a + 1e999", "is too large"),
        ("clip(a, 1)", "clip takes 3 values, and is given 2"),
        ("lower_bound(a)", "lower_bound takes 2 or more values, and is given 1"),
        ("standard(a + b)", "standard takes the name of a scorer alone"),
        ("tokens.x + a", "tokens has no parts"),
        ("0.1 * tokens", "it names no scorer"),
        ("-" * 60 + "a", "nested more than 50 levels deep"),
        ("(" * 900 + "a" + ")" * 900, "not an expression|characters"),
        ("a + " * 600 + "a", "characters, more than the maximum of 2000"),
        ("a\x00", "not an expression"),
        ("", "it is empty. Write a computation over the names of other scorers, for example 0.7"),
        (" ", "it is empty"),
        ("()", r"\(\) is not allowed: there is nothing in the parentheses"),
        ("a and ()", r"\(\) is not allowed: there is nothing in the parentheses"),
        ("a and", "not an expression: invalid syntax. Write"),
        ("a if b", "not an expression: expected 'else' after 'if' expression. Write"),
        ("min()", r"min takes 1 or more values, and is given 0. Write min\(x, y, ...\)"),
        ("abs()", r"abs takes 1 value, and is given 0. Write abs\(x\)"),
        ("a.b.c", "it has more than one dot. A name is SCORER or SCORER.PART"),
        ("clip(a, 5, 1)", r"clip\(a, 5, 1\): the lower bound 5 is above the upper bound 1. Write clip\(a, 1, 5\)"),
        ("1 + clip(a, 2 * 3, -1)", r"the lower bound 6 is above the upper bound -1. Write clip\(a, -1, 2 \* 3\)"),
        ("a / 0", "a / 0: it divides by 0, which is 0"),
        ("a if b else b / (1 - 1)", r"b / \(1 - 1\): it divides by 1 - 1, which is 0"),
        ("a + log(0)", r"log\(0\): it is not a finite number"),
        ("a * sqrt(0 - 1)", r"sqrt\(0 - 1\): it is not a finite number"),
        ("a * 1e300 + 1e200 * 1e200", r"1e\+200 \* 1e\+200: it is not a finite number"),
        ("5 < a < 1", "5 < a < 1: it never holds, because 5 is above 1"),
        ("1 >= a > b >= 5", "it never holds, because 1 is below 5"),
        ("lower_bound(a, b)", r"a is not the number of standard deviations, .* Write lower_bound\(1, a, b\)"),
        ("lower_bound(1, a)", "a alone has no spread. Give two scorers or more"),
        ("a + overlong(tokens, 128, 512)", "cannot begin 512 tokens before the limit of 128"),
        ("a + overlong(tokens, 0, 0)", "a limit of 0 tokens allows no response"),
    ],
)
def test_what_is_no_expression_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Expression(text)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_normalisation_within_a_prompt(values: list[float]) -> None:
    ranks, scores = rank(values), zscore(values)
    assert all(0 <= one <= 1 for one in ranks)
    assert math.fsum(ranks) == pytest.approx(len(values) / 2)
    assert math.fsum(scores) == pytest.approx(0, abs=1e-6 * len(values))
    for one, other in zip(range(len(values)), range(1, len(values)), strict=False):
        assert (values[one] < values[other]) == (ranks[one] < ranks[other])


def test_overlong_is_that_of_dapo() -> None:
    """Equation 13 of arXiv 2503.14476 with a limit of 20 and a cache of 4."""
    assert [overlong(length, 20, 4) for length in (3, 16, 17, 18, 20, 21, 99)] == [0, 0, -0.25, -0.5, -1, -1, -1]


def test_cycles() -> None:
    assert cycle_in({"a": ["b", "c"], "b": ["c"], "c": []}) is None
    assert cycle_in({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert cycle_in({"a": ["a"]}) == ["a", "a"]


TEXTS = [["good .", "great film .", "bad"], ["awful .", "bad .", "good good good ."], ["blue .", "long"]]


@pytest.fixture
def rollouts(tmp_path: Path) -> Artifact:
    """Two shards."""
    return publish_rollouts(tmp_path / "rollouts", [make_rollout(n, texts) for n, texts in enumerate(TEXTS)], shard=2)


def scored(tmp_path: Path, rollouts: Artifact, output: str, **keys: Any) -> Artifact:
    made = run_stage(SCORE, score_config(output=tmp_path / output, rollouts=rollouts.path, name=output, **keys))
    assert made is not None
    return made


@pytest.fixture
def parts(tmp_path: Path, rollouts: Artifact) -> dict[str, Path]:
    """`words`, which does not judge `bad`, and `brief`."""
    (tmp_path / "mine.py").write_text(
        "def judge(*, response, **others):\n    count = len(response.split())\n"
        "    return None if response == 'bad' else {'score': count, 'half': count / 2}"
    )
    words = scored(tmp_path, rollouts, "words", kind="rule", function=f"{tmp_path}/mine.py:judge", max_dropped=0.5)
    brief = scored(tmp_path, rollouts, "brief", kind="length", unit="words", high=2)
    return {"words": words.path, "brief": brief.path}


def test_the_stage_joins_and_computes(tmp_path: Path, rollouts: Artifact, parts: dict[str, Path]) -> None:
    """By hand; a sample that a part lacks is dropped and counted, and each score has what it was made of."""
    text = "words.half + (brief and words > 1) - 0.01 * tokens - truncated"
    made = scored(tmp_path, rollouts, "reward", kind="combined", expression=text, scores=parts, max_dropped=0.5)
    found = {(row.prompt_id, row.sample): row for row in made.rows(Score)}
    for row in rollouts.rows(Rollout):
        for one in row.completions:
            if one.text == "bad":
                assert (row.prompt_id, one.sample) not in found
                continue
            count = len(one.text.split())
            brief = float(count <= 2)
            score = found[row.prompt_id, one.sample]
            cut = one.finish_reason == "length"
            assert score.score == pytest.approx(count / 2 + (brief and count > 1) - 0.01 * len(one.response_ids) - cut)
            assert score.parts == {"words_half": count / 2, "brief": brief, "words": count}
    assert made.manifest.ledger.dropped == {"no_words_half": 1}
    with pytest.raises(
        UserError, match=r"Scorer 'words' has no part 'half' for these; the ledger in .*words counts why"
    ):
        scored(tmp_path, rollouts, "again", kind="combined", expression=text, scores=parts)
    assert made.manifest.facts["brief_mean"] == pytest.approx(5 / 7)


def test_combined_scores_of_two_policies_can_be_compared_if_their_parts_can(tmp_path: Path, rollouts: Artifact) -> None:
    """As an evaluation compares them with those of the initial policy."""
    later = publish_rollouts(tmp_path / "later", [make_rollout(n, texts[::-1]) for n, texts in enumerate(TEXTS)])

    def judged(answers: Artifact, name: str, high: int) -> Artifact:
        part = scored(tmp_path, answers, f"brief-{name}", kind="length", unit="words", high=high)
        scores = {"brief": part.path}
        return scored(tmp_path, answers, name, kind="combined", expression="brief - truncated", scores=scores)

    first = scorer_of(judged(rollouts, "first", 2))
    assert first == scorer_of(judged(later, "second", 2))
    assert first != scorer_of(judged(later, "third", 3)), "another part"


def test_normalisation_is_by_prompt(tmp_path: Path, rollouts: Artifact, parts: dict[str, Path]) -> None:
    made = scored(
        tmp_path, rollouts, "reward", kind="combined", expression="rank(words)", scores=parts, max_dropped=0.5
    )
    assert [row.score for row in made.rows(Score)] == [0.0, 1.0, 0.25, 0.25, 1.0, 1.0, 0.0]


def test_standard_goes_by_published_scores(tmp_path: Path, rollouts: Artifact, parts: dict[str, Path]) -> None:
    keys: dict[str, Any] = {"kind": "combined", "expression": "standard(words)", "scores": parts, "max_dropped": 0.5}
    made = scored(tmp_path, rollouts, "reward", standards={"words": parts["words"]}, **keys)
    values = [row.score for row in made.rows(Score)]
    assert math.fsum(values) == pytest.approx(0)
    assert math.fsum(value**2 for value in values) / len(values) == pytest.approx(1)


def test_what_cannot_be_combined_is_refused(tmp_path: Path, rollouts: Artifact, parts: dict[str, Path]) -> None:
    def tried(text: str, **keys: Any) -> None:
        scored(
            tmp_path, rollouts, "reward", kind="combined", expression=text, max_dropped=0.5, **{"scores": parts, **keys}
        )

    with pytest.raises(UserError, match=r"scores has no 'other', which is in the expression. Set scores.other=SCORES"):
        tried("other + words")
    with pytest.raises(UserError, match=r"the expression names words.whole, but .* have no part 'whole'. Known: half"):
        tried("words.whole")
    with pytest.raises(UserError, match=r"standards has no 'words'"):
        tried("standard(words)")
    with pytest.raises(UserError, match=r"words / \(brief - brief\) divides by brief - brief, which is 0") as told:
        tried("1 + (words / (brief - brief) if words > 0 else brief / (words - words))")
    assert "scorer 'reward', expression '1 + (words / (brief - brief) if" in str(told.value)
    assert "dtype" not in str(told.value)
    with pytest.raises(
        UserError, match=r"for prompt \w+ \(\".*\"\), sample 0, log\(brief - brief\) is not a finite number"
    ):
        tried("words * log(brief - brief)")
    others = publish_rollouts(tmp_path / "others", [make_rollout(9, ["good ."])])
    with pytest.raises(UserError, match="was made from other rollouts"):
        scored(tmp_path, others, "reward", kind="combined", expression="words", scores=parts)
    alone = scored(tmp_path, others, "alone", kind="length", high=2)
    with pytest.raises(UserError, match=r"standard\(brief\) is measured by .* 1 scores that do not differ"):
        tried("standard(brief)", standards={"brief": alone.path})
