"""A policy, judged by what it answered to held-out prompts."""

from annotation.config import EvaluationConfig
from contracts.declaration import Stage
from contracts.records import EVALUATION

EVALUATE = Stage(EvaluationConfig, EVALUATION, "annotation.evaluation:run", command="evaluate")
