"""K answers to every prompt, sampled from the current policy."""

from contracts.declaration import Stage
from contracts.records import ROLLOUTS
from generation.config import GenerationConfig

GENERATION = Stage(GenerationConfig, ROLLOUTS, "generation.run:run")
