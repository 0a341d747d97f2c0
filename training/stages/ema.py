"""An average of the policies."""

from dataclasses import dataclass
from pathlib import Path

from contracts.declaration import Stage
from contracts.records import CHECKPOINT
from training.config import EmaConfig


@dataclass(frozen=True)
class Averaging(Stage[EmaConfig]):
    """The moving of an average of weights towards a model."""

    def origin(self, config: EmaConfig) -> Path | None:
        """The model that enters the average."""
        return config.model


EMA = Averaging(EmaConfig, CHECKPOINT, "training.ema:run")
