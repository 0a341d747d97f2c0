"""Declares the stage that converts SmolLM2-135M-Instruct to a model directory."""

from contracts.declaration import Stage
from contracts.records import CHECKPOINT
from embedded.config import Smollm2Config

MAKE_SMOLLM2 = Stage(Smollm2Config, CHECKPOINT, "embedded.smollm2:run", environment="training")
