"""A reward for a real small chat model: one short, finished sentence about the topic asked for.

`function=embedded.concise:concise`. The topic is the prompt's known `answer` (configs/data/topics-*.jsonl). It measures
form, not sense, which is what a model of 135M parameters can be seen to learn on a CPU.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

SHORTEST, LONGEST = 5, 15
"""Words of a good sentence."""


def concise(
    *, messages: Sequence[Mapping[str, str]], response: str, finish_reason: str, answer: str | None
) -> float | None:
    """How well an answer keeps to the form, from 0 to 1; None where the prompt has no topic.

    0.3 for 5 to 15 words (falling to 0 at none and at 30), 0.2 for exactly one sentence, 0.2 for an answer that ends by
    itself, 0.2 for naming the topic, 0.1 for not repeating itself (the share of different word pairs).
    """
    if answer is None:
        return None
    words = re.findall(r"[\w'-]+", response.lower())
    if not words:
        return 0.0
    pairs = list(pairwise(words))
    variety = len(set(pairs)) / len(pairs) if pairs else 1.0
    return (
        0.3 * min(1.0, len(words) / SHORTEST, max(0.0, 2 - len(words) / LONGEST))
        + 0.2 * (sentences(response) == 1)
        + 0.2 * (finish_reason == "stop")
        + 0.2 * names(answer, words)
        + 0.1 * variety
    )


def sentences(text: str) -> int:
    """Number of complete sentences; a rest without a full stop, a question or an exclamation mark makes it 0."""
    text = text.strip()
    if not text.endswith((".", "!", "?")):
        return 0
    return len(re.findall(r"[.!?]+(?=\s|$)", text)) + text.count("\n")


def names(topic: str, words: Sequence[str]) -> bool:
    """Whether all words of the topic occur, in the singular or the plural."""
    return all(any(_same(wanted, word) for word in words) for wanted in topic.lower().split())


def _same(first: str, second: str) -> bool:
    return first in _forms(second) or second in _forms(first)


def _forms(word: str) -> set[str]:
    word = word.removesuffix("'s")
    return {word, f"{word}s", f"{word}es", *([f"{word[:-1]}ies"] if word.endswith("y") else [])}
