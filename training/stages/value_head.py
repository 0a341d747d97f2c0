"""A critic that knows nothing yet: a model with a head that says 0."""

from dataclasses import dataclass
from pathlib import Path

from contracts.declaration import Stage
from contracts.records import CHECKPOINT
from training.config import ValueHeadConfig


@dataclass(frozen=True)
class NewCritic(Stage[ValueHeadConfig]):
    """The making of an untrained critic."""

    def origin(self, config: ValueHeadConfig) -> Path | None:
        """The model that gets the head."""
        return config.model

    def has_score_head(self, config: ValueHeadConfig) -> bool:
        """It gives the value of every token."""
        return True


VALUE_HEAD = NewCritic(ValueHeadConfig, CHECKPOINT, "training.value_head:run")
