"""The scorer kind `pairwise_judge`: a language model behind an OpenAI-compatible endpoint compares two answers."""

from typing import ClassVar, Literal

from annotation.scorers.base import ComparingConfig, ComparingSettings
from annotation.scorers.remote import JudgeSettings
from contracts.config import identity


class PairwiseJudgeSettings(ComparingSettings, JudgeSettings):
    """Settings of a judge that compares."""

    kind: Literal["pairwise_judge"] = identity()
    """A language model behind an OpenAI-compatible endpoint that compares responses; a response's score is its mean
    probability of being better than others."""

    opened_by: ClassVar[str] = "annotation.remote.comparing:PairwiseJudge"
    template_names: ClassVar[tuple[str, ...]] = ("first", "second")


class PairwiseJudgeConfig(PairwiseJudgeSettings, ComparingConfig):
    """Have the answers to each prompt compared by a judge behind an endpoint."""
