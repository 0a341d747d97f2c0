"""Declares the stage `value-head`, which creates an untrained critic: a model with a value head of zeros."""

from dataclasses import dataclass
from pathlib import Path

from contracts.declaration import ModelUse, Stage
from contracts.models import ModelInfo
from contracts.outlook import PROCESS_BYTES, Memory, Outlook
from contracts.records import CHECKPOINT
from training.config import ValueHeadConfig
from training.estimates import model_bytes


@dataclass(frozen=True)
class UntrainedCritic(Stage[ValueHeadConfig]):
    """Creation of an untrained critic."""

    def models(self, config: ValueHeadConfig) -> tuple[ModelUse, ...]:
        """The model to which the head is added."""
        return (ModelUse(config.model, (ModelInfo.require_causal,)),)

    def libraries(self, config: ValueHeadConfig) -> tuple[str, ...]:
        """Libraries that load a model."""
        return ("torch", "transformers")

    def memory(self, config: ValueHeadConfig, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """Two copies of the weights in fp32: as read, and as written."""
        size = outlook.size_of(config.model)
        return None if size is None else Memory({"weights": 2 * 4 * size.parameters, "process": PROCESS_BYTES}, 1)

    def published_bytes(self, config: ValueHeadConfig, outlook: Outlook) -> int | None:
        """Four bytes per parameter, and the tokenizer."""
        return model_bytes(config.output, outlook)

    def origin(self, config: ValueHeadConfig) -> Path | None:
        """The model to which the head is added."""
        return config.model

    def has_score_head(self, config: ValueHeadConfig) -> bool:
        """True: the head returns the value of each token."""
        return True


VALUE_HEAD = UntrainedCritic(
    ValueHeadConfig, CHECKPOINT, "training.value_head:run", preflight="training.preflight:check_new_critic"
)
