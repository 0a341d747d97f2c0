"""The configs of the toy task (`world`) and of the model that Ratchet can create itself (`smollm2`)."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import model_validator

from contracts.config import Section, StageConfig, identity, input_path

WORLD_FILES = ("demonstrations.jsonl", "heldout.jsonl", "model", "preference.jsonl", "train.jsonl")
"""The files and directories that the stage `world` publishes."""


class WorldSettings(Section):
    """The settings of the toy task: the sizes of its prompt sets and of its model."""

    demonstrations: int = identity(3072, ge=1)
    """Conversations to imitate, of mixed quality."""
    train: int = identity(2304, ge=1)
    """Prompts for the online iterations."""
    preference: int = identity(1536, ge=1)
    """Prompts for the reward model's preference data."""
    heldout: int = identity(384, ge=1)
    """Prompts that no stage trains on."""
    hidden_size: int = identity(64, ge=32, multiple_of=32)
    """Width of the model; it has one attention head for each 32."""
    layers: int = identity(2, ge=1)
    """Depth of the model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        from embedded.reviews import all_prompts  # its patterns take time to compile, and most runs have no toy task

        wanted = self.demonstrations + self.train + self.preference + self.heldout
        if wanted > (available := len(all_prompts())):
            raise ValueError(
                f"demonstrations, train, preference and heldout need {wanted} different prompts, but the task has "
                f"{available}. Lower one of them."
            )
        return self


class WorldConfig(WorldSettings, StageConfig):
    """Create the toy task: an untrained tiny model, demonstrations and three disjoint sets of prompts."""

    stage: ClassVar[str] = "world"
    code_version: ClassVar[int] = 1

    seed: int = identity(0, ge=0)
    """Seed of the initial weights, the demonstrations, and the assignment of prompts to sets."""


class Smollm2Config(StageConfig):
    """Convert SmolLM2-135M-Instruct from a GGUF file (downloaded by scripts/get-smollm2.sh) to a model directory."""

    stage: ClassVar[str] = "smollm2"
    code_version: ClassVar[int] = 1

    source: Path = input_path()
    """The GGUF file."""
