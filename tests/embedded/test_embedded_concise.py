"""The reward for one short sentence, and its topics."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedded.concise import concise, names, sentences

GOOD = "Rivers carry fresh water from the mountains to the sea."


def score(response: str, finish_reason: str = "stop", answer: str | None = "rivers") -> float | None:
    return concise(messages=[], response=response, finish_reason=finish_reason, answer=answer)


def test_each_demand_counts() -> None:
    assert score(GOOD) == pytest.approx(1.0)
    assert score(GOOD, "length") == pytest.approx(0.8)
    assert score(GOOD, answer="clocks") == pytest.approx(0.8)
    assert score(GOOD.removesuffix(".")) == pytest.approx(0.8)
    assert score("Rivers flow fast today. Rivers carry water.") == pytest.approx(0.8)
    assert score("Rivers flow.") == pytest.approx(0.7 + 0.3 * 2 / 5)
    assert score("Rivers flow " * 20 + ".") == pytest.approx(0.6 + 0.1 * 2 / 39)
    assert score("") == score(" \n") == 0.0


def test_without_a_topic_there_is_no_judgement() -> None:
    assert score(GOOD, answer=None) is None


@pytest.mark.parametrize(
    ("topic", "text", "expected"),
    [
        ("rivers", "a river", True),
        ("butterflies", "one butterfly", True),
        ("buses", "the bus", True),
        ("glass", "a glass", True),
        ("cats", "the cat's tail", True),
        ("ants", "giants", False),
        ("rain", "trains", False),
    ],
)
def test_a_topic_is_named_in_the_singular_or_the_plural(topic: str, text: str, expected: bool) -> None:
    assert names(topic, text.split()) is expected


@pytest.mark.parametrize(
    ("text", "expected"), [("A b.", 1), ("A b", 0), ("A. B!", 2), ("A 3.5 b.", 1), ("A...", 1), ("A.\nB.", 3), ("", 0)]
)
def test_sentences(text: str, expected: int) -> None:
    assert sentences(text) == expected


@given(response=st.text(max_size=80), finish_reason=st.sampled_from(["stop", "length"]))
def test_the_reward_stays_between_0_and_1(response: str, finish_reason: str) -> None:
    value = score(response, finish_reason)
    assert value is not None
    assert 0.0 <= value <= 1.0 + 1e-9


def test_the_committed_topics_are_disjoint_and_named_in_their_prompts(root: Path) -> None:
    rows = {
        name: [json.loads(line) for line in (root / f"configs/data/topics-{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    }
    topics = {name: {row["answer"] for row in found} for name, found in rows.items()}
    assert len(topics["train"]) == len(rows["train"]) >= 48
    assert len(topics["heldout"]) == len(rows["heldout"]) >= 40
    assert not topics["train"] & topics["heldout"]
    assert all(row["prompt"].endswith(f"about {row['answer']}.") for found in rows.values() for row in found)
