"""Declares the stage `merge`, which merges a PEFT adapter into its model."""

from contracts.declaration import Stage
from contracts.records import CHECKPOINT
from training.config import MergeConfig

MERGE = Stage(MergeConfig, CHECKPOINT, "training.merge:run")
