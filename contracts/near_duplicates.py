"""Finds near-duplicate prompts by the Jaccard similarity of their word triples.

The similarity is the number of triples that both texts have, divided by the number that either has, and is computed
exactly. Under any fixed order of all triples, two texts whose similarity is at least t share one of the first
n - ceil(t n) + 1 of their n triples (prefix filtering, Bayardo et al. 2007, "Scaling up all pairs similarity search");
the order here is rarest first, so that few candidates have to be compared.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

from contracts.records import Prompt

WIDTH = 3
"""Number of consecutive words in a gram."""
_EAST_ASIAN = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\W{_EAST_ASIAN}]+")
"""A word, or a single character of a script that is written without spaces."""

Grams = frozenset[tuple[str, ...]]


def grams_of(prompt: Prompt) -> Grams:
    """The word triples of a conversation without its system message, ignoring case, punctuation and character width.

    A text of fewer than three words is a single gram.
    """
    text = "\n".join(message.content for message in prompt.messages if message.role != "system")
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return frozenset(zip(*(words[start:] for start in range(WIDTH)), strict=False)) or frozenset([tuple(words)])


def similarity(one: Grams, other: Grams) -> float:
    """The Jaccard similarity, from 0 to 1."""
    return len(one & other) / len(one | other)


def near_duplicates(prompts: Iterable[Prompt], held_out: Iterable[Prompt], threshold: float) -> dict[int, str]:
    """Find the prompts whose similarity to a held-out prompt, or to an earlier one that is kept, reaches `threshold`.

    Returns:
        Their indices with the reason to drop them, near_held_out or near_duplicate.
    """
    others = [grams_of(prompt) for prompt in held_out]
    own = [grams_of(prompt) for prompt in prompts]
    frequency = Counter(gram for grams in (*others, *own) for gram in grams)
    index: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    known: list[Grams] = []

    def prefix(grams: Grams) -> list[tuple[str, ...]]:
        length = len(grams) - math.ceil(threshold * len(grams) - 1e-9) + 1
        return sorted(grams, key=lambda gram: (frequency[gram], gram))[:length]

    def add(grams: Grams) -> None:
        for gram in prefix(grams):
            index[gram].append(len(known))
        known.append(grams)

    for grams in others:
        add(grams)
    found: dict[int, str] = {}
    for number, grams in enumerate(own):
        candidates = {place for gram in prefix(grams) for place in index.get(gram, ())}
        similar = [place for place in candidates if similarity(grams, known[place]) >= threshold]
        if similar:
            found[number] = "near_held_out" if min(similar) < len(others) else "near_duplicate"
        else:
            add(grams)
    return found
