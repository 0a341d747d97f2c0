"""Sections of a run's configuration that are no stage's own settings."""

import re
from typing import Any

from pydantic import field_validator

from annotation.config import PairsSettings
from contracts.config import Section, identity, runtime
from contracts.prompts import PromptsSettings
from generation.config import GenerationSettings
from pipelines.environments.launch import EnvironmentConfig
from training.config import CriticSettings, RewardSettings


class PromptsSection(Section):
    """Where the prompts come from. No stage trains on the held-out ones."""

    train: PromptsSettings = identity()
    """Prompts to learn from."""
    heldout: PromptsSettings = identity()
    """Prompts to judge by."""
    per_iteration: int | None = identity(None, ge=1)
    """Prompts per iteration, taken in turn from the training prompts; all of them by default."""


class RewardModelSection(Section):
    """Train the reward model first, on answers of the initial policy that another scorer labels."""

    prompts: PromptsSettings = identity()
    """Prompts whose answers are compared."""
    label: str = identity("gold")
    """Scorer that says which answer is better."""
    generation: GenerationSettings = identity({})
    """How the answers are sampled; keys that are not set are those of the section `generation`."""
    pairs: PairsSettings = identity({})
    """How the pairs are chosen."""
    training: RewardSettings = identity({})
    """How the reward model is trained."""


class CriticSection(CriticSettings):
    """Train a critic beside the policy, for algorithms that need values."""

    start: str | None = identity(None)
    """What the first critic is: reward_model (the model of the scorer `reward`), policy (the initial policy with a head
    that says 0), or a directory or hf:ORG/NAME of a classifier with one label and the policy's tokenizer. By default
    the reward model if there is one, else the policy."""


class EnvironmentsSection(Section):
    """What each kind of stage runs in; by default the locked environment of `pipeline env sync`."""

    generation: EnvironmentConfig = runtime(EnvironmentConfig())
    """For `python -m generation`."""
    annotation: EnvironmentConfig = runtime(EnvironmentConfig())
    """For `python -m annotation` and `python -m contracts`."""
    training: EnvironmentConfig = runtime(EnvironmentConfig())
    """For `python -m training` and `python -m embedded`."""

    def of(self, name: str) -> EnvironmentConfig:
        """That of a stage, by the name of its environment."""
        return {"generation": self.generation, "annotation": self.annotation, "training": self.training}[name]


class RetentionSection(Section):
    """What stays on the disk while the run goes on; docs/concepts.md says what is never deleted."""

    keep: str = runtime("all")
    """Whose weights stay: all; best, of the checkpoints so far; or "last N". What is still needed stays in any case."""
    compress: bool = runtime(False)
    """Keep the rollouts and scores of finished iterations compressed."""

    @field_validator("keep", mode="before")
    @classmethod
    def _check_keep(cls, value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch("all|best|last [1-9][0-9]*", value):
            raise ValueError('it must be all, best, or "last N" with a number from 1 on, for example "last 3".')
        return value


class HardwareSection(Section):
    """What a configuration is written for."""

    gpus: int = runtime(ge=1)
    """GPUs of one machine."""
    gib: float = runtime(gt=0)
    """Memory of each, in GiB."""
