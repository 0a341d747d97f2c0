"""The scorer kind `math`: whether an answer's result equals the known one, checked with math-verify."""

import logging
import resource
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from annotation.scorers.base import ScoreConfig, WorkerSettings
from annotation.scorers.exact_match import last_match
from annotation.scorers.regex import valid_pattern
from contracts.config import identity, runtime

MARKED = ("$", r"\boxed", r"\(", r"\[")


class MathSettings(WorkerSettings):
    """Settings of a math verifier."""

    kind: Literal["math"] = identity()
    """Whether the result of an answer equals the prompt's `answer` as mathematics: 1/2, 0.5 and \\frac{1}{2} are the
    same."""
    extract_answer: str | None = identity(None)
    """A regular expression for the result in the prompt's `answer`, for example "#### (.*)" for gsm8k: its last match,
    or the match's first group. By default the whole of it."""
    digits: int = identity(6, ge=1, le=15)
    """Digits after the decimal point to which inexact numbers are compared."""
    fail_on_error: float = identity(0.1, ge=0, lt=1)
    """Share of the completions whose scoring may fail, because it takes too long or too much memory; they are dropped
    and counted. 0: the first failure stops the stage."""
    seconds_per_sample: float | None = runtime(10.0, gt=0)
    """Time limit for scoring one completion, after which it is killed and counts as failed: computer algebra does not
    terminate on some results, such as towers of powers."""
    memory_gib: float = runtime(4.0, gt=0)
    """Memory limit of a scoring process, in GiB; a completion that needs more fails."""

    calls: ClassVar[str] = "annotation.scorers.math:MathVerifier"
    further_libraries: ClassVar[tuple[str, ...]] = ("latex2sympy2-extended", "math-verify", "sympy")

    @field_validator("extract_answer")
    @classmethod
    def _check(cls, value: str | None) -> str | None:
        return value if value is None else valid_pattern(value)

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments of `MathVerifier`."""
        return {"extract_answer": self.extract_answer, "digits": self.digits, "memory_gib": self.memory_gib}

    @property
    def reads_answer(self) -> bool:
        """Whether it requires the prompt's known `answer`: always."""
        return True


class MathConfig(MathSettings, ScoreConfig):
    """Score every completion by its mathematical result."""


class MathVerifier:
    """Verifies results. The time limits of math-verify are off, since the pool kills this process when it is late."""

    def __init__(self, *, extract_answer: str | None, digits: int, memory_gib: float) -> None:
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns about every answer that it cannot parse
        most = int(memory_gib * (1 << 30))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        self.library, self.extract_answer, self.digits = math_verify, extract_answer, digits
        self.known: dict[str, list[Any]] = {}

    def __call__(self, *, response: str, answer: str | None, **others: Any) -> dict[str, Any] | None:
        """1 or 0, the part `parsed` and the extracted result; None if the prompt has no answer that can be parsed."""
        if answer is None:
            return None
        if answer not in self.known:
            result = last_match(self.extract_answer, answer)
            self.known[answer] = [] if result is None else self._parse_known(result)
        known = self.known[answer]
        if not known:
            return None
        found = self._parse(response)
        right = bool(found) and self.library.verify(
            known, found, float_rounding=self.digits, timeout_seconds=None, raise_on_error=False
        )
        shown = str(found[-1])[:500] if found else None
        return {"score": float(right), "parsed": float(bool(found)), "extracted": shown}

    def _parse_known(self, text: str) -> list[Any]:
        marked = text if any(sign in text for sign in MARKED) else rf"\boxed{{{text}}}"
        return self._parse(marked) or self._parse(text)

    def _parse(self, text: str) -> list[Any]:
        found: list[Any] = self.library.parse(text, parsing_timeout=None, raise_on_error=False)
        return found
