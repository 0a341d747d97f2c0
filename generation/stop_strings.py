"""Detects stop strings while an answer is sampled, and cuts the answer's text at them. Pure except for the tokenizer.

The rule is vLLM's (vllm/v1/engine/detokenizer.py), so that both engines end an answer at the same token: the text is
that of the tokens after the prompt, without special tokens, and the answer ends with the token that completes a stop
string; of several, the one that is complete first counts.
"""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""Replacement character, to which tokenizers decode an incomplete UTF-8 sequence."""


class StopStrings:
    """Detects stop strings in one answer."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str], min_tokens: int) -> None:
        """Start at the end of a prompt.

        Args:
            tokenizer: a tokenizer of the library `tokenizers`.
            prompt_ids: token ids of the prompt.
            stop: the stop strings.
            min_tokens: stop strings that are completed within this many tokens are ignored.
        """
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream: Any = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)
        self._stop = stop
        self._left = min_tokens
        self._text = ""
        self._kept = max(map(len, stop)) - 1

    def add(self, token: int) -> str | None:
        """Add the next token; returns the stop string that it completes, or None."""
        new = self._stream.step(self._tokenizer, token) or ""
        self._left -= 1
        before, self._text = len(self._text), self._text + new
        found = first_complete(self._text, self._stop, before) if self._left < 0 else None
        self._text = self._text[-self._kept :] if self._kept else ""
        return found


def first_complete(text: str, stop: Sequence[str], known: int) -> str | None:
    """The stop string that ends first after the first `known` characters of a text, or None."""
    ends = [
        (start + len(one), place, one)
        for place, one in enumerate(stop)
        if (start := text.find(one, max(0, known - len(one) + 1))) >= 0
    ]
    return min(ends)[2] if ends else None


def cut_at_stop(text: str, before: str, stop: str, *, include: bool) -> str | None:
    """Cut an answer's text at the stop string that ended it; None if the text does not contain it.

    Args:
        text: the answer's text.
        before: the text without the last token, which completed the stop string.
        stop: the stop string.
        include: whether to keep the stop string.
    """
    known = len(before.rstrip(REPLACEMENT))
    start = text.find(stop, max(0, known - len(stop) + 1))
    if start < 0 and stop.startswith(" ") and text.startswith(stop.lstrip(" ")):
        start, stop = 0, stop.lstrip(" ")  # SentencePiece decoders omit a leading space
    return None if start < 0 else text[: start + len(stop) * include]
