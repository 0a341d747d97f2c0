"""How a judge's answer is read: a rating or a verdict by a pattern, from JSON, or from the probabilities of its token.

A reading is a number, or None where the answer holds none: then it is no judgement, and never a bad one.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from annotation.remote.answers import Said, Token

_BETWEEN = r"[\s*_:=\"'\[`]*"
RATING = rf"(?i)\brating\b{_BETWEEN}(-?\d+(?:\.\d+)?)(?![\d.]*\d)"
VERDICT = rf"(?i:\bverdict\b{_BETWEEN}(?:answer\s+)?)(A|B|(?i:tie))\b(?!\s+(?i:tie))"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
THOUGHT = "</think>"
"""Ends what a judge thinks aloud before it answers."""


class Reading:
    """Reads answers of one form."""

    def __init__(self, form: str, pattern: str, key: str, values: Mapping[str, float] | tuple[float, float]) -> None:
        """Prepare.

        Args:
            form: pattern, json or logprobs.
            pattern: what finds the rating; its first group, at its last place in the answer.
            key: of the JSON object that holds it.
            values: what a verdict counts, by its name in small letters; or the lowest and the highest rating.
        """
        self.form, self.pattern, self.key, self.values = form, re.compile(pattern), key, values

    def __call__(self, said: Said) -> float | None:
        """What an answer says."""
        if self.form == "logprobs":
            return self._expected(said.tokens or [])
        if said.finish_reason == "length":  # it had not come to its judgement
            return None
        if self.form == "json":
            return self._value(_from_json(said.text, self.key))
        found = self._find(said.text)
        return None if found is None else self._value(found[0])

    def _find(self, text: str) -> tuple[str, int] | None:
        """The rating's text and place: behind what the judge thinks, at the last place, or all that it says."""
        begin = text.rfind(THOUGHT) + 1
        places = list(self.pattern.finditer(text, begin))
        if places and places[-1][1] is not None:
            return places[-1][1], places[-1].start(1)
        alone = text[begin + len(THOUGHT) - 1 if begin else 0 :]
        bare = alone.strip().strip("*.[]()\"'`")
        return (bare, text.rindex(bare)) if self._value(bare) is not None else None

    def _value(self, text: Any) -> float | None:
        """What a rating's text counts; None where it is none, or off the scale."""
        if isinstance(self.values, Mapping):
            return self.values.get(str(text).strip().lower())
        if isinstance(text, bool) or not NUMBER.fullmatch(str(text).strip()):
            return None
        low, high = self.values
        return value if low <= (value := float(text)) <= high else None

    def _expected(self, tokens: list[Token]) -> float | None:
        """The mean of what could stand in the rating's place, by probability, of what would be a rating.

        As in G-Eval (Liu et al. 2023, arXiv 2303.16634, section 2.3), normalised over the ratings. Each must be one
        token, with or without a blank before it.
        """
        found = self._find("".join(token.text for token in tokens))
        if found is None:
            return None
        end = 0
        for token in tokens:
            end += len(token.text)
            if found[1] < end:
                break
        if _word(token.text) != found[0]:  # a token that holds more, or less
            return None
        weights: dict[float, list[float]] = {}
        for text, logprob in token.top:
            if (value := self._value(_word(text))) is not None and math.isfinite(logprob):
                weights.setdefault(value, []).append(math.exp(logprob))
        total = math.fsum(weight for several in weights.values() for weight in several)
        if not total:
            return None
        return math.fsum(value * weight for value, several in weights.items() for weight in several) / total


def _word(token: str) -> str:
    """A token's text without the blank before it, however its tokenizer writes that."""
    return token.strip(" \n\t▁Ġ")


def _from_json(text: str, key: str) -> Any:
    """The value of a key in the last JSON object of a text that has it, also between other words."""
    decoder = json.JSONDecoder()
    found, place = None, text.rfind(THOUGHT) + 1
    while (place := text.find("{", place)) >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        found = value.get(key, found)
        place = end
    return found
