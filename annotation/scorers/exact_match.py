"""The scorer kind `exact_match`: whether an answer equals the prompt's known one."""

import functools
import itertools
import re
import string
import unicodedata
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from annotation.scorers.base import ScoreConfig, WorkerSettings
from annotation.scorers.regex import valid_pattern
from contracts.config import identity

Ignored = Literal["case", "blanks", "punctuation", "articles"]
PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatchSettings(WorkerSettings):
    """Settings of a comparison with the known answer."""

    kind: Literal["exact_match"] = identity()
    """Whether a response equals the prompt's `answer`, in Unicode form NFKC: é may be one character or two, full-width
    letters and digits equal half-width ones; superscripts, subscripts and fractions are kept."""
    extract: str | None = identity(None)
    """A regular expression for the text to compare: its last match in the response, or the match's first group; a
    response without a match is wrong. By default the whole response."""
    extract_answer: str | None = identity(None)
    """The same for the prompt's `answer`, for example "#### (.*)" for gsm8k; an answer without a match is not
    scored."""
    ignore: list[Ignored] = identity(["case", "blanks"])
    """Differences to ignore: case; whitespace, except one blank between words; punctuation; the articles a, an, the."""
    numbers: bool = identity(True)
    """Compare numbers as numbers: 1,000 and $1000.00 are the same."""

    calls: ClassVar[str] = "annotation.scorers.exact_match:judge"

    @field_validator("extract", "extract_answer")
    @classmethod
    def _check(cls, value: str | None) -> str | None:
        return value if value is None else valid_pattern(value)

    @property
    def reads_answer(self) -> bool:
        """Whether it requires the prompt's known `answer`: always."""
        return True


class ExactMatchConfig(ExactMatchSettings, ScoreConfig):
    """Score every completion by comparison with the known answer."""


def judge(
    *,
    response: str,
    answer: str | None,
    extract: str | None,
    extract_answer: str | None,
    ignore: list[Ignored],
    numbers: bool,
    **others: Any,
) -> dict[str, Any] | None:
    """1 or 0, and the text that was extracted; None if the prompt has no answer."""
    known = answer if answer is None else last_match(extract_answer, answer)
    if known is None:
        return None
    found = last_match(extract, response)
    if found is None:
        return {"score": 0.0, "extracted": ""}
    plain_found, plain_known = normalised_unicode(found), normalised_unicode(known)
    same = normalised(plain_found, ignore) == normalised(plain_known, ignore)
    if not same and numbers:
        one, other = number(plain_found), number(plain_known)
        same = one is not None and one == other
    return {"score": float(same), "extracted": found[:1000]}


def last_match(pattern: str | None, text: str) -> str | None:
    """The last match of a pattern, or that match's first group; None if there is no match. Without a pattern, the text
    itself."""
    if pattern is None:
        return text
    matches = list(_compiled(pattern).finditer(text))
    if not matches:
        return None
    return matches[-1][1] if matches[-1].re.groups else matches[-1][0]


def normalised_unicode(text: str) -> str:
    """A text in Unicode normalization form NFKC (Unicode Standard Annex 15), except superscripts, subscripts and
    fractions, since NFKC turns 10² into 102."""
    if text.isascii():
        return text
    runs = ((apart, "".join(run)) for apart, run in itertools.groupby(text, _is_raised_or_fraction))
    return unicodedata.normalize(
        "NFC", "".join(run if apart else unicodedata.normalize("NFKC", run) for apart, run in runs)
    )


def _is_raised_or_fraction(letter: str) -> bool:
    return unicodedata.decomposition(letter).startswith(("<super>", "<sub>", "<fraction>"))


def normalised(text: str, ignore: list[Ignored]) -> str:
    """A text without the differences to ignore."""
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = text.translate(PUNCTUATION)
    if "articles" in ignore:
        text = re.sub(r"\b(a|an|the)\b", " ", text, flags=re.IGNORECASE)
    return " ".join(text.split()) if "blanks" in ignore else text


def number(text: str) -> Decimal | None:
    """The number that a text denotes, or None."""
    plain = text.strip().rstrip(".").replace(",", "").lstrip("$€£").removesuffix("%")
    try:
        found = Decimal(plain)
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
