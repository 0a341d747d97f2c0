"""Declares the stages that export and import answers and rewards in RLHFlow's format."""

from annotation.config import RlhflowExportConfig, RlhflowImportConfig, RlhflowScoresConfig
from annotation.data.rlhflow import RLHFLOW
from contracts.declaration import Stage
from contracts.records import ROLLOUTS, SCORES

RLHFLOW_EXPORT = Stage(RlhflowExportConfig, RLHFLOW, "annotation.data.rlhflow:run_export")
RLHFLOW_IMPORT = Stage(RlhflowImportConfig, ROLLOUTS, "annotation.data.rlhflow:run_import")
RLHFLOW_SCORES = Stage(RlhflowScoresConfig, SCORES, "annotation.data.rlhflow:run_scores")
