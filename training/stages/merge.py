"""An adapter, merged into its model."""

from contracts.declaration import Stage
from contracts.records import CHECKPOINT
from training.config import MergeConfig

MERGE = Stage(MergeConfig, CHECKPOINT, "training.merge:run")
