"""A checkpoint, evaluated by a function of the user's own."""

from dataclasses import dataclass

from annotation.config import CheckpointEvaluationConfig
from contracts.declaration import ModelUse, Stage
from contracts.outlook import PROCESS, STAGE, Memory, Outlook
from contracts.records import CHECKPOINT_EVALUATION


@dataclass(frozen=True)
class CheckpointEvaluation(Stage[CheckpointEvaluationConfig]):
    """An evaluation of the user's own. Nothing is known of its function but that it reads the checkpoint."""

    def uses_devices(self, config: CheckpointEvaluationConfig) -> bool:
        """Its function may."""
        return True

    def models(self, config: CheckpointEvaluationConfig) -> tuple[ModelUse, ...]:
        """The checkpoint."""
        return (ModelUse(config.checkpoint),)

    def memory(self, config: CheckpointEvaluationConfig, outlook: Outlook, *, on_gpu: bool) -> Memory | None:
        """The weights alone, as they are loaded most often: a·P."""
        size = outlook.size_of(config.checkpoint)
        if size is None:
            return None
        return Memory({"weights": size.parameters * (2 if on_gpu else 4), "process": PROCESS}, processes=1)

    def published_bytes(self, config: CheckpointEvaluationConfig, outlook: Outlook) -> int:
        """Its metrics; the function's files are not known."""
        return STAGE


EVALUATE_CHECKPOINT = CheckpointEvaluation(
    CheckpointEvaluationConfig,
    CHECKPOINT_EVALUATION,
    "annotation.evaluating.checkpoint_evaluation:run",
    preflight="annotation.preflight:check_evaluation",
    command="evaluate-checkpoint",
)
