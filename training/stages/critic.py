"""Declares the stage `critic`, which trains a critic on the returns of an experience."""

from dataclasses import dataclass

from contracts.outlook import Outlook
from contracts.records import CHECKPOINT
from training.config import CriticConfig
from training.estimates import RowShape
from training.stages.trainer import Training, longest_experience, mean_row_of


@dataclass(frozen=True)
class CriticTraining(Training[CriticConfig]):
    """Training of a critic."""

    def row_count(self, config: CriticConfig, outlook: Outlook) -> int | None:
        """Number of prompts in the experience."""
        answers = outlook.answers_of(config.experience)
        return None if answers is None else answers.prompts.count

    def longest_row(self, config: CriticConfig, outlook: Outlook) -> RowShape | None:
        """The longest prompt with all of its answers."""
        return longest_experience(outlook.answers_of(config.experience), config.max_length)

    def mean_row(self, config: CriticConfig, outlook: Outlook) -> RowShape | None:
        """A prompt of mean length with all of its answers."""
        answers = outlook.answers_of(config.experience)
        return mean_row_of(answers, answers.k if answers else 1, config.max_length)

    def has_score_head(self, config: CriticConfig) -> bool:
        """True: the head returns the value of each token."""
        return True

    def row_limit(self, config: CriticConfig) -> int | None:
        """The config's `max_length`."""
        return config.max_length


CRITIC = CriticTraining(CriticConfig, CHECKPOINT, "training.critic:run")
