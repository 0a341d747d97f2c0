"""The embedded task: review a thing in so many words, and the judge that knows a good review from a bad one.

    prompt  "review the village hotel in two words :"
    answer  "the hotel was bright and charming ."

Everything is plain Python, so that it runs in every stage's environment. `gold_score` and `well_formed` are rule
scorers (`function=embedded.reviews:gold_score`). The reward model of the quickstart never sees them: it only sees
pairs of answers that `gold_score` has ordered.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

Messages = Sequence[Mapping[str, str]]
"""A conversation: `role` and `content` of each turn."""

VERBS = ("assess", "critique", "describe", "evaluate", "judge", "rank", "rate", "review")
SETTINGS = (
    "autumn", "beach", "city", "coastal", "country", "evening", "family", "harbour", "island", "local",
    "morning", "mountain", "northern", "river", "school", "seaside", "summer", "valley", "village", "winter",
)  # fmt: skip
NOUNS = (
    "bakery", "book", "cinema", "coffee", "festival", "film", "garden", "hotel",
    "library", "market", "museum", "music", "park", "shop", "story", "train",
)  # fmt: skip
COUNTS = {"one word": 1, "two words": 2, "three words": 3}

POSITIVE = (
    "brilliant", "bright", "charming", "cheerful", "delightful", "elegant", "fine", "friendly",
    "great", "happy", "kind", "lovely", "pleasant", "splendid", "superb", "wonderful",
)  # fmt: skip
NEGATIVE = (
    "awful", "bitter", "boring", "cruel", "dirty", "dreadful", "dull", "gloomy",
    "horrible", "nasty", "poor", "rude", "sad", "tedious", "terrible", "ugly",
)  # fmt: skip
NEUTRAL = (
    "blue", "brief", "common", "foreign", "large", "long", "modern", "narrow",
    "new", "old", "plain", "quiet", "round", "small", "usual", "wooden",
)  # fmt: skip
ADJECTIVES = (*POSITIVE, *NEGATIVE, *NEUTRAL)

_PROMPT = re.compile(
    rf"(?:{'|'.join(VERBS)}) the (?:{'|'.join(SETTINGS)}) (?P<noun>{'|'.join(NOUNS)})"
    rf" in (?P<count>{'|'.join(COUNTS)}) :"
)
_SUBJECT = rf"the (?P<noun>{'|'.join(NOUNS)})"
_ADJECTIVE = f"(?:{'|'.join(ADJECTIVES)})"
_LIST = rf"(?P<list>{_ADJECTIVE}|{_ADJECTIVE} and {_ADJECTIVE}|{_ADJECTIVE} , {_ADJECTIVE} and {_ADJECTIVE}) \."
_REVIEWS = (re.compile(f"{_SUBJECT} was {_LIST}"), re.compile(f"i found {_SUBJECT} {_LIST}"))


@dataclass(frozen=True)
class Request:
    """What a prompt asks for."""

    noun: str
    count: int


@dataclass(frozen=True)
class Review:
    """What a well-formed answer says."""

    noun: str
    adjectives: tuple[str, ...]


def all_prompts() -> list[str]:
    """Every prompt of the task, in a fixed order."""
    choices = product(VERBS, SETTINGS, NOUNS, COUNTS)
    return [f"{verb} the {setting} {noun} in {count} :" for verb, setting, noun, count in choices]


def vocabulary() -> list[str]:
    """Every word of prompts and answers, sorted."""
    grammar = ("the", "in", "was", "and", "i", "found", ",", ".", ":")
    counts = " ".join(COUNTS).split()
    return sorted({*VERBS, *SETTINGS, *NOUNS, *ADJECTIVES, *counts, *grammar})


def read_request(prompt: str) -> Request:
    """Understand a prompt.

    Raises:
        ValueError: it is not one of `all_prompts`.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"{prompt!r} is not a prompt of the embedded task, so its answers cannot be judged.")
    return Request(match["noun"], COUNTS[match["count"]])


def read_review(text: str) -> Review | None:
    """Understand an answer; None when it breaks the grammar or repeats an adjective."""
    for form in _REVIEWS:
        if match := form.fullmatch(" ".join(text.split())):
            adjectives = tuple(word for word in match["list"].split() if word in ADJECTIVES)
            if len(set(adjectives)) == len(adjectives):
                return Review(match["noun"], adjectives)
    return None


def write_review(review: Review, *, found: bool) -> str:
    """The answer that says `review`, as "i found the ..." or "the ... was ..."; `read_review` reads it back."""
    subject = f"the {review.noun}"
    *first, last = review.adjectives
    words = f"{' , '.join(first)} and {last}" if first else last
    return f"i found {subject} {words} ." if found else f"{subject} was {words} ."


def gold_score(*, messages: Messages, response: str, finish_reason: str, answer: str | None) -> float:
    """How good a review is, from 0 to 1.

    0 for an answer that is truncated or breaks the grammar. Otherwise 0.1, plus 0.1 if it is about the thing asked
    for, plus 0.1 if it has as many adjectives as asked for, plus up to 0.7 for being positive: a positive adjective
    counts 1, a neutral one a half, a negative one nothing, and their mean is taken.
    """
    request = read_request(messages[-1]["content"])
    review = read_review(response)
    if review is None or finish_reason != "stop":
        return 0.0
    on_subject = review.noun == request.noun
    right_count = len(review.adjectives) == request.count
    praise = [1.0 if word in POSITIVE else 0.5 if word in NEUTRAL else 0.0 for word in review.adjectives]
    return 0.1 + 0.1 * on_subject + 0.1 * right_count + 0.7 * sum(praise) / len(praise)


def well_formed(*, messages: Messages, response: str, finish_reason: str, answer: str | None) -> float:
    """1 for a complete answer that follows the grammar, whatever it says; otherwise 0."""
    return float(finish_reason == "stop" and read_review(response) is not None)
