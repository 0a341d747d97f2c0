"""Declares the stage `evaluate`: evaluates a policy by its answers to held-out prompts."""

from dataclasses import dataclass

from annotation.config import EvaluationConfig
from contracts.declaration import Stage
from contracts.outlook import STAGE_BYTES, Outlook
from contracts.records import EVALUATION


@dataclass(frozen=True)
class Evaluation(Stage[EvaluationConfig]):
    """The evaluation of a policy by its scores."""

    def published_bytes(self, config: EvaluationConfig, outlook: Outlook) -> int:
        """Size of its metrics."""
        return STAGE_BYTES


EVALUATE = Evaluation(EvaluationConfig, EVALUATION, "annotation.evaluating.evaluation:run", command="evaluate")
