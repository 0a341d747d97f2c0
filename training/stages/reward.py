"""A reward model, trained on preference pairs."""

from dataclasses import dataclass

from contracts.records import CHECKPOINT
from training.config import RewardConfig
from training.stages.trainer import Training


@dataclass(frozen=True)
class RewardTraining(Training[RewardConfig]):
    """The training of a reward model."""

    def has_score_head(self, config: RewardConfig) -> bool:
        """A Bradley-Terry model gives a number; a pairwise one answers in words."""
        return config.kind == "bradley_terry"


REWARD = RewardTraining(RewardConfig, CHECKPOINT, "training.reward:run")
