"""The critic, trained on the returns of an experience."""

from dataclasses import dataclass

from contracts.records import CHECKPOINT
from training.config import CriticConfig
from training.stages.trainer import Training


@dataclass(frozen=True)
class CriticTraining(Training[CriticConfig]):
    """The training of a critic."""

    def has_score_head(self, config: CriticConfig) -> bool:
        """It gives the value of every token."""
        return True


CRITIC = CriticTraining(CriticConfig, CHECKPOINT, "training.critic:run")
