"""Declares the stage `ema`, which updates a moving average of the policies."""

from dataclasses import dataclass
from pathlib import Path

from contracts.declaration import ModelUse, Stage
from contracts.outlook import PROCESS_BYTES, Memory, Outlook
from contracts.records import CHECKPOINT
from training.config import EmaConfig
from training.estimates import model_bytes


@dataclass(frozen=True)
class AverageUpdate(Stage[EmaConfig]):
    """Update of a moving average of weights with a model."""

    def models(self, config: EmaConfig) -> tuple[ModelUse, ...]:
        """The current average and the model to add."""
        return ModelUse(config.average), ModelUse(config.model)

    def libraries(self, config: EmaConfig) -> tuple[str, ...]:
        """Libraries that load a model."""
        return ("torch", "transformers")

    def memory(self, config: EmaConfig, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """Three models in fp32: the current average, the model to add and the new average."""
        size = outlook.size_of(config.model)
        return None if size is None else Memory({"weights": 3 * 4 * size.parameters, "process": PROCESS_BYTES}, 1)

    def published_bytes(self, config: EmaConfig, outlook: Outlook) -> int | None:
        """Four bytes per parameter, and the tokenizer."""
        return model_bytes(config.output, outlook)

    def origin(self, config: EmaConfig) -> Path | None:
        """The model to add."""
        return config.model


EMA = AverageUpdate(EmaConfig, CHECKPOINT, "training.ema:run", preflight="training.preflight:check_average")
