"""The scorer kind `length`: whether the length of an answer lies within a band."""

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from annotation.scorers.base import ScoreConfig, WorkerSettings
from contracts.config import identity


class LengthSettings(WorkerSettings):
    """Settings of a length check."""

    kind: Literal["length"] = identity()
    """The length of a response: 1 within a band, less outside it."""
    unit: Literal["tokens", "words", "characters"] = identity("tokens")
    """What is counted. Tokens are the policy's, including the stop token."""
    low: int = identity(0, ge=0)
    """The lower end of the band."""
    high: int | None = identity(None, ge=0)
    """The upper end of the band; none by default."""
    margin: int = identity(0, ge=0)
    """Outside the band the score falls from 1 to 0 over this many units; 0: at once."""

    calls: ClassVar[str] = "annotation.scorers.length:judge"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high is not None and self.high < self.low:
            raise ValueError(f"high={self.high} is below low={self.low}, so no length would be right.")
        return self


class LengthConfig(LengthSettings, ScoreConfig):
    """Score every completion by its length."""


def judge(
    *, response: str, response_ids: list[int], unit: str, low: int, high: int | None, margin: int, **others: Any
) -> dict[str, float]:
    """1 - (distance from the band) / (margin), at least 0."""
    count = {"tokens": len(response_ids), "words": len(response.split()), "characters": len(response)}[unit]
    distance = max(low - count, count - high if high is not None else 0, 0)
    score = 1.0 if distance == 0 else max(0.0, 1 - distance / margin) if margin else 0.0
    return {"score": score, "length": count}
