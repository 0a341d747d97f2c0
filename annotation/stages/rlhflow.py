"""Exchange of answers and rewards with RLHFlow."""

from annotation.config import RlhflowExportConfig, RlhflowImportConfig, RlhflowScoresConfig
from annotation.rlhflow import RLHFLOW
from contracts.declaration import Stage
from contracts.records import ROLLOUTS, SCORES

RLHFLOW_EXPORT = Stage(RlhflowExportConfig, RLHFLOW, "annotation.rlhflow:run_export")
RLHFLOW_IMPORT = Stage(RlhflowImportConfig, ROLLOUTS, "annotation.rlhflow:run_import")
RLHFLOW_SCORES = Stage(RlhflowScoresConfig, SCORES, "annotation.rlhflow:run_scores")
