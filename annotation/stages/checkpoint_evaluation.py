"""Declares the stage `evaluate-checkpoint`: evaluates a checkpoint with a user's own function."""

from dataclasses import dataclass

from annotation.config import CheckpointEvaluationConfig
from contracts.declaration import ModelUse, Stage
from contracts.outlook import PROCESS_BYTES, STAGE_BYTES, Memory, Outlook
from contracts.records import CHECKPOINT_EVALUATION


@dataclass(frozen=True)
class CheckpointEvaluation(Stage[CheckpointEvaluationConfig]):
    """A user's own evaluation. Its function is unknown, except that it reads the checkpoint."""

    def uses_devices(self, config: CheckpointEvaluationConfig) -> bool:
        """Whether it needs devices: always, since its function may use them."""
        return True

    def models(self, config: CheckpointEvaluationConfig) -> tuple[ModelUse, ...]:
        """The models that it reads: the checkpoint."""
        return (ModelUse(config.checkpoint),)

    def memory(self, config: CheckpointEvaluationConfig, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """Memory of the weights in the usual dtype, a·P; what else the function needs is unknown."""
        size = outlook.size_of(config.checkpoint)
        if size is None:
            return None
        return Memory({"weights": size.parameters * (2 if on_gpu else 4), "process": PROCESS_BYTES}, processes=1)

    def published_bytes(self, config: CheckpointEvaluationConfig, outlook: Outlook) -> int:
        """Size of its metrics; that of the function's files is unknown."""
        return STAGE_BYTES


EVALUATE_CHECKPOINT = CheckpointEvaluation(
    CheckpointEvaluationConfig,
    CHECKPOINT_EVALUATION,
    "annotation.evaluating.checkpoint_evaluation:run",
    preflight="annotation.preflight:check_evaluation",
    command="evaluate-checkpoint",
)
