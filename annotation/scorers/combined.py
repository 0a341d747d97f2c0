"""The scorer kind `combined`: an expression over the scores of other scorers, which are stored as parts."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from annotation.scorers.base import RewardScorerSettings, ScoreConfig
from annotation.scorers.expression import Expression
from contracts.artifacts import Artifact
from contracts.config import identity, input_path
from contracts.errors import UserError
from contracts.joining import require_made_from
from contracts.records import SCORES


def part_name(written: str) -> str:
    """A name in an expression as the name of a part of the score: helpful.clear becomes helpful_clear."""
    return written.replace(".", "_")


def missing_reason(written: str) -> str:
    """The reason in the drop ledger for samples that have no value for a name in the expression."""
    return f"no_{part_name(written)}"


class CombinedSettings(RewardScorerSettings):
    """Settings of a combined score."""

    kind: Literal["combined"] = identity()
    """An expression over the scores of other scorers."""
    expression: str = identity()
    """For example 0.7 * helpful + 0.3 * form - 0.001 * tokens: names of other scorers (their parts: helpful.clear),
    tokens (the response's length), truncated (1 if it was truncated), + - * /, comparisons, and, or, not, A if B else
    C, and functions. Responses that one of the scorers has not scored are dropped and counted."""

    opened_by: ClassVar[str] = "annotation.combining:Combined"
    follows_rollouts: ClassVar[bool] = False

    @field_validator("expression")
    @classmethod
    def _check_expression(cls, value: str) -> str:
        Expression(value)
        return value

    @property
    def components(self) -> list[str]:
        """The scorers that the expression names."""
        return Expression(self.expression).scorers

    @property
    def ensemble(self) -> list[str]:
        """The scorers that the expression averages, or takes the minimum or a lower bound of."""
        return Expression(self.expression).ensemble

    @property
    def standardised(self) -> list[str]:
        """The scorers in standard(...), whose scores of the initial policy it also reads."""
        return sorted(Expression(self.expression).standardised)

    @property
    def display_name(self) -> str:
        """The expression."""
        return self.expression


class CombinedConfig(CombinedSettings, ScoreConfig):
    """Score every completion by an expression over its scores."""

    scores: dict[str, Path] = input_path({})
    """Published scores of the rollouts by the scorers that the expression names."""
    standards: dict[str, Path] = input_path({})
    """Published scores of the scorers used in standard(...), for their mean and standard deviation."""

    @model_validator(mode="after")
    def _check_scores(self) -> Self:
        for key, wanted, given in (
            ("scores", self.components, self.scores), ("standards", self.standardised, self.standards)
        ):  # fmt: skip
            if missing := [name for name in wanted if name not in given]:
                raise ValueError(
                    f"{key} has no {missing[0]!r}, which is in the expression. Set {key}.{missing[0]}=SCORES."
                )
        if self.pairs is not None:
            raise ValueError("kind=combined scores all answers, not only those in pairs: leave pairs out.")
        return self

    def fixes(self, unread: str) -> dict[str, str]:
        """Advice by reason: which scorer has not scored the samples, and where its own reasons are."""
        found = super().fixes(unread)
        for written, (name, part) in Expression(self.expression).names.items():
            what = "score" if part is None else f"part {part!r}"
            found[missing_reason(written)] = (
                f"Scorer {name!r} has no {what} for these; the ledger in {self.scores[name]} counts why. Fix that "
                f"scorer{'' if part is None else ' to return the part every time'},"
            )
        return found

    def facts_of(self, rollouts: Artifact) -> dict[str, Any]:
        """Check the scores that the expression reads; adds no facts.

        Raises:
            UserError: scores are of other rollouts, or lack a part that the expression names.
        """
        opened = {name: Artifact.open(self.scores[name], SCORES) for name in self.components}
        for scores in opened.values():
            require_made_from(rollouts, scores)
        for name, part in Expression(self.expression).names.values():
            facts = opened[name].manifest.facts
            if part is not None and opened[name].manifest.ledger.kept and f"{part}_mean" not in facts:
                known = sorted(fact.removesuffix("_mean") for fact in facts if fact.endswith("_mean"))
                raise UserError(
                    f"the expression names {name}.{part}, but the scores in {opened[name].path} have no part {part!r}. "
                    f"Known: {', '.join(one for one in known if one != 'score') or 'none'}."
                )
        return {}
