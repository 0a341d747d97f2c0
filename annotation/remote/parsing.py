"""Reads a rating or verdict from a judge's reply: by a pattern, from JSON, or from the probabilities of its token.

The result is a number, or None if the reply has none. A reply without a judgement is never scored as a bad one.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from annotation.remote.replies import Reply, Token

_BETWEEN = r"[\s*_:=\"'\[`]*"
RATING = rf"(?i)\brating\b{_BETWEEN}(-?\d+(?:\.\d+)?)(?![\d.]*\d)"
VERDICT = rf"(?i:\bverdict\b{_BETWEEN}(?:answer\s+)?)(A|B|(?i:tie))\b(?!\s+(?i:tie))"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
THOUGHT = "</think>"
"""Ends the reasoning of a thinking model, which is not searched."""


class ReplyParser:
    """Reads replies of one form."""

    def __init__(self, form: str, pattern: str, key: str, values: Mapping[str, float] | tuple[float, float]) -> None:
        """Compile the pattern.

        Args:
            form: `pattern`, `json` or `logprobs`.
            pattern: regular expression whose first group is the judgement; its last match in the reply counts.
            key: key of the JSON object with the judgement.
            values: the value of each verdict, by its name in lower case; or the lowest and the highest rating.
        """
        self.form, self.pattern, self.key, self.values = form, re.compile(pattern), key, values

    def __call__(self, reply: Reply) -> float | None:
        """The number in a reply, or None."""
        if self.form == "logprobs":
            return self._expected(reply.tokens or [])
        if reply.finish_reason == "length":  # truncated before its judgement
            return None
        if self.form == "json":
            return self._value(_from_json(reply.text, self.key))
        found = self._find(reply.text)
        return None if found is None else self._value(found[0])

    def _find(self, text: str) -> tuple[str, int] | None:
        """Text and position of the judgement: the pattern's last match after the reasoning, or else the whole rest of
        the reply if that is a valid value."""
        begin = text.rfind(THOUGHT) + 1
        places = list(self.pattern.finditer(text, begin))
        if places and places[-1][1] is not None:
            return places[-1][1], places[-1].start(1)
        alone = text[begin + len(THOUGHT) - 1 if begin else 0 :]
        bare = alone.strip().strip("*.[]()\"'`")
        return (bare, text.rindex(bare)) if self._value(bare) is not None else None

    def _value(self, text: Any) -> float | None:
        """The number for a judgement's text; None if it is not a valid verdict or rating, or is off the scale."""
        if isinstance(self.values, Mapping):
            return self.values.get(str(text).strip().lower())
        if isinstance(text, bool) or not NUMBER.fullmatch(str(text).strip()):
            return None
        low, high = self.values
        return value if low <= (value := float(text)) <= high else None

    def _expected(self, tokens: list[Token]) -> float | None:
        """The expected value over the alternatives to the rating's token that are valid ratings.

        As in G-Eval (Liu et al. 2023, arXiv 2303.16634, section 2.3), with probabilities normalized over the valid
        ratings. Each rating must be a single token, with or without a leading blank.
        """
        found = self._find("".join(token.text for token in tokens))
        if found is None:
            return None
        end = 0
        for token in tokens:
            end += len(token.text)
            if found[1] < end:
                break
        if _word(token.text) != found[0]:  # the rating is not exactly one token
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
    """A token's text without the leading blank, in any tokenizer's notation."""
    return token.strip(" \n\t▁Ġ")


def _from_json(text: str, key: str) -> Any:
    """The value of a key in the last JSON object that has it, after the reasoning; other text around it is ignored."""
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
