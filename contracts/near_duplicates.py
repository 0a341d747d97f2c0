"""Prompts that say almost the same: by how many of their word triples two have in common.

Similarity is Jaccard's: the triples that both have, divided by those that either has. It is computed exactly. Two
texts whose similarity is at least t have one of the first n - ceil(t n) + 1 of n triples in common, in whatever order
all texts agree on (prefix filtering, Bayardo et al. 2007, "Scaling up all pairs similarity search"); the order here is
the rarest first, so that few others have to be looked at.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

from contracts.records import Prompt

WIDTH = 3
"""Words in a row."""
_EAST_ASIAN = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\W{_EAST_ASIAN}]+")
"""A word, or one character of a script that has no blanks between them."""

Grams = frozenset[tuple[str, ...]]


def grams_of(prompt: Prompt) -> Grams:
    """The word triples of a conversation, without its system message, whatever its case, signs and width of letters.

    Of fewer words it is all of them as one.
    """
    text = "\n".join(message.content for message in prompt.messages if message.role != "system")
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return frozenset(zip(*(words[start:] for start in range(WIDTH)), strict=False)) or frozenset([tuple(words)])


def similarity(one: Grams, other: Grams) -> float:
    """Jaccard's, from 0 to 1."""
    return len(one & other) / len(one | other)


def near_duplicates(prompts: Iterable[Prompt], held_out: Iterable[Prompt], threshold: float) -> dict[int, str]:
    """Which prompts are at least so similar to one that is held out, or to an earlier one that is kept.

    Returns:
        Their indices, with why they are dropped: near_held_out, or near_duplicate.
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
