"""Supervised fine-tuning on demonstrations."""

from contracts.records import CHECKPOINT
from training.config import SftConfig
from training.stages.trainer import Training

SFT = Training(SftConfig, CHECKPOINT, "training.sft:run")
