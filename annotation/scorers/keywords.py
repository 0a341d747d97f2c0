"""The scorer kind `keywords`: whether an answer contains required words and avoids forbidden ones."""

import functools
import re
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from annotation.scorers.base import ScoreConfig, WorkerSettings
from contracts.config import identity


class KeywordsSettings(WorkerSettings):
    """Settings of a keyword check."""

    kind: Literal["keywords"] = identity()
    """The share of required words in a response, and 0 if it contains a forbidden one."""
    required: list[str] = identity([])
    """Required words or phrases."""
    forbidden: list[str] = identity([])
    """Forbidden words or phrases."""
    case: bool = identity(False)
    """Whether matching is case-sensitive."""
    whole_words: bool = identity(True)
    """Whether to match whole words only."""

    calls: ClassVar[str] = "annotation.scorers.keywords:judge"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.required and not self.forbidden:
            raise ValueError("required and forbidden are both empty; name a word in one of them.")
        if not all(word.strip() for word in (*self.required, *self.forbidden)):
            raise ValueError("required or forbidden has an empty word; remove it.")
        return self


class KeywordsConfig(KeywordsSettings, ScoreConfig):
    """Score every completion by the words that it contains."""


def judge(
    *, response: str, required: list[str], forbidden: list[str], case: bool, whole_words: bool, **others: Any
) -> dict[str, Any]:
    """The share of required words that occur, or 0 if a forbidden one occurs."""
    missing = [word for word in required if not _pattern(word, case, whole_words).search(response)]
    said = [word for word in forbidden if _pattern(word, case, whole_words).search(response)]
    share = 1 - len(missing) / len(required) if required else 1.0
    shown = {"missing": missing or None, "said": said or None}
    return {"score": 0.0 if said else share, "required": share, "forbidden": len(said), **shown}


@functools.cache
def _pattern(word: str, case: bool, whole: bool) -> re.Pattern[str]:
    text = r"\s+".join(map(re.escape, word.split()))
    return re.compile(rf"(?<!\w){text}(?!\w)" if whole else text, 0 if case else re.IGNORECASE)
