"""Declares the stage `reward`, which trains a reward model on preference pairs."""

from collections.abc import Callable
from dataclasses import dataclass

from contracts.models import ModelInfo
from contracts.outlook import Outlook
from contracts.records import CHECKPOINT
from training.config import RewardConfig
from training.estimates import RowShape
from training.stages.trainer import Training, all_pairs, longest_pair, mean_pair, total_pairs


@dataclass(frozen=True)
class RewardTraining(Training[RewardConfig]):
    """Training of a reward model."""

    def row_count(self, config: RewardConfig, outlook: Outlook) -> int | None:
        """Number of pairs."""
        return total_pairs(all_pairs(config.pairs, outlook))

    def longest_row(self, config: RewardConfig, outlook: Outlook) -> RowShape | None:
        """The longest pair; for a pairwise model the longest question, whose two answers are one token each."""
        pairs, limit = all_pairs(config.pairs, outlook), config.max_length
        questions = [found.answers.question_tokens for found in pairs if found is not None]
        if config.kind == "pairwise" and questions:
            return RowShape(min(max(questions), limit or max(questions)), 1, 2)
        return longest_pair(pairs, limit)

    def mean_row(self, config: RewardConfig, outlook: Outlook) -> RowShape | None:
        """A pair whose prompt has the mean length; for a pairwise model the question with both answers."""
        row = mean_pair(all_pairs(config.pairs, outlook), config.max_length)
        if row is None or config.kind == "bradley_terry":
            return row
        return RowShape(row.prompt + 2 * row.answer, 1, 2)

    def reads_as(self, config: RewardConfig) -> tuple[Callable[[ModelInfo], None], ...]:
        """For a pairwise model a chat template, in which its questions are rendered."""
        return (ModelInfo.require_chat_template,) if config.kind == "pairwise" else ()

    def has_score_head(self, config: RewardConfig) -> bool:
        """True for a Bradley-Terry model, which returns a score; a pairwise model answers with a token."""
        return config.kind == "bradley_terry"

    def row_limit(self, config: RewardConfig) -> int | None:
        """The config's `max_length`."""
        return config.max_length


REWARD = RewardTraining(RewardConfig, CHECKPOINT, "training.reward:run")
