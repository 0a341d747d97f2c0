"""The scorer kind `judge`: a language model behind an OpenAI-compatible endpoint rates each answer."""

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from annotation.scorers.base import RewardScorerSettings, ScoreConfig
from annotation.scorers.remote import JudgeSettings
from contracts.config import identity


class RatingSettings(JudgeSettings, RewardScorerSettings):
    """Settings of a judge that rates."""

    kind: Literal["judge"] = identity()
    """A language model behind an OpenAI-compatible endpoint, which rates each response."""
    lowest: int = identity(1)
    """The worst rating; the score is the rating itself, the mean of the votes."""
    highest: int = identity(10)
    """The best rating."""

    opened_by: ClassVar[str] = "annotation.remote.rating:RatingJudge"
    template_names: ClassVar[tuple[str, ...]] = ("response",)

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest={self.lowest} is not below highest={self.highest}.")
        if self.extraction == "logprobs" and not 0 <= self.lowest < self.highest <= 9:
            raise ValueError(
                "extraction=logprobs reads ratings of one digit, which are one token everywhere. Set lowest and "
                "highest within 0 and 9, for example highest=5."
            )
        return self


class RatingConfig(RatingSettings, ScoreConfig):
    """Have every completion rated by a judge behind an endpoint."""
