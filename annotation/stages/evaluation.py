"""A policy, judged by what it answered to held-out prompts."""

from dataclasses import dataclass

from annotation.config import EvaluationConfig
from contracts.declaration import Stage
from contracts.outlook import STAGE, Outlook
from contracts.records import EVALUATION


@dataclass(frozen=True)
class Evaluation(Stage[EvaluationConfig]):
    """The judgement of a policy."""

    def published_bytes(self, config: EvaluationConfig, outlook: Outlook) -> int:
        """Its metrics."""
        return STAGE


EVALUATE = Evaluation(EvaluationConfig, EVALUATION, "annotation.evaluating.evaluation:run", command="evaluate")
