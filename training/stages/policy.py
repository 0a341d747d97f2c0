"""The policy, trained by an algorithm on pairs or on experience."""

from contracts.records import CHECKPOINT
from training.config import PolicyConfig
from training.stages.trainer import Training

POLICY = Training(PolicyConfig, CHECKPOINT, "training.policy:run")
