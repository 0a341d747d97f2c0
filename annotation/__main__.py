"""`python -m annotation {score,pairs,evaluate,rlhflow-export,rlhflow-import,rlhflow-scores}`."""

import os
import sys

# Ours before anything in the working directory that is called the same.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from contracts import surroundings

if __name__ == "__main__":
    surroundings.settle()

from annotation.config import (
    EvaluationConfig,
    PairsConfig,
    RlhflowExportConfig,
    RlhflowImportConfig,
    RlhflowScoresConfig,
    ScoreConfig,
)
from annotation.rlhflow import RLHFLOW
from contracts.records import EVALUATION, PAIRS, ROLLOUTS, SCORES
from contracts.stage import Command, main

COMMANDS = {
    "score": Command(ScoreConfig, SCORES, "annotation.scoring:run"),
    "pairs": Command(PairsConfig, PAIRS, "annotation.pairs:run"),
    "evaluate": Command(EvaluationConfig, EVALUATION, "annotation.evaluation:run"),
    "rlhflow-export": Command(RlhflowExportConfig, RLHFLOW, "annotation.rlhflow:run_export"),
    "rlhflow-import": Command(RlhflowImportConfig, ROLLOUTS, "annotation.rlhflow:run_import"),
    "rlhflow-scores": Command(RlhflowScoresConfig, SCORES, "annotation.rlhflow:run_scores"),
}

if __name__ == "__main__":
    main(COMMANDS, "annotation")
