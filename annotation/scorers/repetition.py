"""The scorer kind `repetition`: a penalty for the share of an answer's n-grams that are repeated."""

from typing import Any, ClassVar, Literal

from annotation.scorers.base import ScoreConfig, WorkerSettings
from contracts.config import identity


class RepetitionSettings(WorkerSettings):
    """Settings of a repetition penalty."""

    kind: Literal["repetition"] = identity()
    """From 0 to -1: minus the share of a response's n-grams that are repeated, as in arXiv 2502.03373."""
    n: int = identity(3, ge=1)
    """Words or tokens per n-gram."""
    unit: Literal["words", "tokens"] = identity("words")
    """The unit of n-grams; use tokens for languages without blanks between words."""
    weight: float = identity(1.0, gt=0)
    """The penalty for a response that only repeats."""

    calls: ClassVar[str] = "annotation.scorers.repetition:judge"


class RepetitionConfig(RepetitionSettings, ScoreConfig):
    """Score every completion by its repetitions."""


def judge(*, response: str, response_ids: list[int], n: int, unit: str, weight: float, **others: Any) -> float:
    """-weight · (1 - distinct n-grams / n-grams); 0 for answers that are too short to have an n-gram."""
    units: list[Any] = response.lower().split() if unit == "words" else response_ids
    grams = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    return -weight * (1 - len(set(grams)) / len(grams)) if grams else 0.0
