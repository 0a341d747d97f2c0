"""A reward model, trained on preference pairs."""

from collections.abc import Callable
from dataclasses import dataclass

from contracts.models import ModelInfo
from contracts.outlook import Outlook
from contracts.records import CHECKPOINT
from training.config import RewardConfig
from training.estimates import LongestRow
from training.stages.trainer import Training, all_pairs, count_of_pairs, longest_pair, mean_pair


@dataclass(frozen=True)
class RewardTraining(Training[RewardConfig]):
    """The training of a reward model."""

    def row_count(self, config: RewardConfig, outlook: Outlook) -> int | None:
        """Pairs."""
        return count_of_pairs(all_pairs(config.pairs, outlook))

    def longest_row(self, config: RewardConfig, outlook: Outlook) -> LongestRow | None:
        """A pair; a pairwise model is asked which of both is better, in either order, and answers with one token."""
        pairs, limit = all_pairs(config.pairs, outlook), config.max_length
        questions = [found.answers.question_tokens for found in pairs if found is not None]
        if config.kind == "pairwise" and questions:
            return LongestRow(min(max(questions), limit or max(questions)), 1, 2)
        return longest_pair(pairs, limit)

    def mean_row(self, config: RewardConfig, outlook: Outlook) -> LongestRow | None:
        """A pair; a pairwise model reads both answers twice, in either order."""
        row = mean_pair(all_pairs(config.pairs, outlook), config.max_length)
        if row is None or config.kind == "bradley_terry":
            return row
        return LongestRow(row.prompt + 2 * row.answer, 1, 2)

    def reads_as(self, config: RewardConfig) -> tuple[Callable[[ModelInfo], None], ...]:
        """A pairwise model is asked in a conversation."""
        return (ModelInfo.require_chat_template,) if config.kind == "pairwise" else ()

    def has_score_head(self, config: RewardConfig) -> bool:
        """A Bradley-Terry model gives a number; a pairwise one answers in words."""
        return config.kind == "bradley_terry"

    def row_limit(self, config: RewardConfig) -> int | None:
        """As it is told."""
        return config.max_length


REWARD = RewardTraining(RewardConfig, CHECKPOINT, "training.reward:run")
