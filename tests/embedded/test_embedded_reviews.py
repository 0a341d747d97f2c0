"""The grammar of the embedded task, and its two judges."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedded.reviews import (
    ADJECTIVES,
    NEGATIVE,
    NEUTRAL,
    NOUNS,
    POSITIVE,
    Review,
    all_prompts,
    gold_score,
    read_request,
    read_review,
    vocabulary,
    well_formed,
    write_review,
)

PROMPT = "review the village hotel in two words :"
GOOD = "the hotel was bright and charming ."

reviews = st.builds(
    Review,
    st.sampled_from(NOUNS),
    st.lists(st.sampled_from(ADJECTIVES), min_size=1, max_size=3, unique=True).map(tuple),
)


def gold(response: str, finish_reason: str = "stop", prompt: str = PROMPT) -> float:
    messages = [{"role": "user", "content": prompt}]
    return gold_score(messages=messages, response=response, finish_reason=finish_reason, answer=None)


def formed(response: str, finish_reason: str = "stop") -> float:
    messages = [{"role": "user", "content": PROMPT}]
    return well_formed(messages=messages, response=response, finish_reason=finish_reason, answer=None)


@given(review=reviews, found=st.booleans())
def test_what_is_written_reads_back_and_is_well_formed(review: Review, found: bool) -> None:
    text = write_review(review, found=found)
    assert read_review(text) == review
    assert formed(text) == 1.0
    assert set(text.split()) <= set(vocabulary())


def test_prompts_differ_and_are_understood() -> None:
    prompts = all_prompts()
    assert len(set(prompts)) == len(prompts)
    assert {word for prompt in prompts for word in prompt.split()} <= set(vocabulary())
    for prompt in random.Random(0).sample(prompts, 100):
        request = read_request(prompt)
        assert request.noun in prompt.split()
        assert f" in {('one', 'two', 'three')[request.count - 1]} word" in prompt


def test_word_lists_do_not_overlap() -> None:
    assert len({*POSITIVE, *NEGATIVE, *NEUTRAL}) == len(ADJECTIVES)
    assert not {*ADJECTIVES} & {*NOUNS}


@pytest.mark.parametrize(
    "response",
    [
        "",
        ".",
        "the hotel was bright and charming",
        "hotel was bright and charming .",
        "the the hotel was bright and charming .",
        "the hotel was bright charming .",
        "the hotel was bright and bright .",
        "the hotel was bright , kind and bright .",
        "the hotel was bright , kind , fine and great .",
        "the hotel was .",
        "the bright was hotel .",
        "i found hotel bright .",
        f"{GOOD} {GOOD}",
    ],
)
def test_broken_answers_are_worth_nothing(response: str) -> None:
    assert gold(response) == formed(response) == 0.0


def test_truncated_answers_are_worth_nothing() -> None:
    assert gold(GOOD, "length") == formed(GOOD, "length") == 0.0


def test_the_best_and_the_worst() -> None:
    assert gold(GOOD) == pytest.approx(1.0)
    assert gold("the hotel was blue and old .") == pytest.approx(0.65)
    assert gold("the hotel was sad and ugly .") == pytest.approx(0.3)
    assert gold("the film was bright and charming .") == pytest.approx(0.9)
    assert gold("the hotel was bright .") == pytest.approx(0.9)
    assert gold("the film was sad .") == pytest.approx(0.1)


@given(review=reviews, found=st.booleans(), place=st.integers(0, 2), word=st.sampled_from(POSITIVE))
def test_a_positive_word_never_makes_a_review_worse(review: Review, found: bool, place: int, word: str) -> None:
    adjectives = list(review.adjectives)
    if word not in adjectives:
        adjectives[place % len(adjectives)] = word
    better = Review(review.noun, tuple(adjectives))
    scores = gold(write_review(review, found=found)), gold(write_review(better, found=found))
    assert 0.1 - 1e-9 <= scores[0] <= scores[1] + 1e-9 <= 1.0 + 2e-9


def test_a_prompt_of_another_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="is not a prompt of the embedded task"):
        gold(GOOD, prompt="What is the capital of France?")
