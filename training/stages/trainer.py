"""What all trainings declare alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from contracts.declaration import Stage
from training.config import TrainingConfig

T = TypeVar("T", bound=TrainingConfig)


@dataclass(frozen=True)
class Training(Stage[T]):
    """A stage that trains a model."""

    launch: str | None = "training.launch:launch"
    helps: str | None = "training.launch:helps"

    def origin(self, config: T) -> Path | None:
        """The model that it trains."""
        return config.model
