"""Texts that end an answer: found while it is sampled, and taken from its text. Pure but for the tokenizer.

The rule is vLLM's (vllm/v1/engine/detokenizer.py), so that both engines end an answer at the same token: the text is
that of the tokens behind the prompt without special tokens, and the answer ends with the token that completes a stop
string, of several that which is complete first.
"""

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"
"""What tokenizers write for bytes that are no character yet."""


class StopStrings:
    """Watches one answer."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str], min_tokens: int) -> None:
        """Begin behind a prompt.

        Args:
            tokenizer: of the library tokenizers.
            min_tokens: what the first so many tokens complete is no end.
        """
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream: Any = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)
        self._stop = stop
        self._left = min_tokens
        self._text = ""
        self._kept = max(map(len, stop)) - 1

    def add(self, token: int) -> str | None:
        """The stop string that a further token completes, or None."""
        new = self._stream.step(self._tokenizer, token) or ""
        self._left -= 1
        before, self._text = len(self._text), self._text + new
        found = first_complete(self._text, self._stop, before) if self._left < 0 else None
        self._text = self._text[-self._kept :] if self._kept else ""
        return found


def first_complete(text: str, stop: Sequence[str], known: int) -> str | None:
    """The first stop string to be complete beyond the first `known` characters of a text; None: there is none."""
    ends = [
        (start + len(one), place, one)
        for place, one in enumerate(stop)
        if (start := text.find(one, max(0, known - len(one) + 1))) >= 0
    ]
    return min(ends)[2] if ends else None


def cut(text: str, before: str, stop: str, *, include: bool) -> str | None:
    """The text of an answer up to the stop string with which it ends; None where it is not in it.

    Args:
        before: the text without the last token, which completed the stop string.
        include: with the stop string.
    """
    known = len(before.rstrip(HALF))
    start = text.find(stop, max(0, known - len(stop) + 1))
    if start < 0 and stop.startswith(" ") and text.startswith(stop.lstrip(" ")):
        start, stop = 0, stop.lstrip(" ")  # decoders of SentencePiece leave the first blank of a text out
    return None if start < 0 else text[: start + len(stop) * include]
