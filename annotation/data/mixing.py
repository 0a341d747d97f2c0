"""Configurations of the stages that mix offline pairs and pairs of earlier iterations into the training set."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from contracts.config import Section, StageConfig, identity, input_path
from contracts.template import ChatFields

PreferenceColumn = Literal["prompt", "chosen", "rejected", "chosen_score", "rejected_score"]


class PreferenceSettings(Section):
    """An existing set of preference pairs: where it is, and which part of it to use."""

    source: Path = input_path()
    """hf:ORG/NAME[:CONFIG][@REVISION], or a path, as for prompts. The layouts of TRL, UltraFeedback and HH-RLHF are
    read without configuration: docs/data.md."""
    split: str = identity("train")
    """Split of a data set that has several."""
    columns: dict[PreferenceColumn, str | None] = identity({})
    """Columns with other names than usual, {chosen: better, rejected: worse}; null reads none."""
    limit: int | None = identity(None, ge=1)
    """Keep only the first this many pairs."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the pairs is dropped."""


class PreferencesImportConfig(PreferenceSettings, ChatFields, StageConfig):
    """Read the answers of preference pairs as rollouts, tokenized with a model's chat template."""

    stage: ClassVar[str] = "preferences-import"
    code_version: ClassVar[int] = 1

    tokenizer: Path = input_path()
    """Directory of the model whose chat template and tokenizer are used for the responses."""
    exclude: list[Path] = input_path([])
    """Published prompts (held-out sets) that must not occur: pairs of these are dropped as held_out, which max_dropped
    does not count."""
    shard_size: int = identity(1024, ge=1)
    """Pairs per shard."""


class PreferencesScoresConfig(PreferenceSettings, StageConfig):
    """Read the preferences in a set of pairs as scores of the rollouts that were imported from it."""

    stage: ClassVar[str] = "preferences-scores"
    code_version: ClassVar[int] = 1

    rollouts: Path = input_path()
    """Rollouts that `preferences-import` published."""


class PairsSampleConfig(StageConfig):
    """Take a random part of published pairs."""

    stage: ClassVar[str] = "pairs-sample"
    code_version: ClassVar[int] = 1

    rollouts: Path = input_path()
    """Rollouts from which the pairs were selected."""
    pairs: Path = input_path()
    """Published pairs."""
    share: float = identity(gt=0, le=1)
    """Share of the pairs to take; with `beside`, their share of both together. With the same seed, pairs of a smaller
    share are a subset of those of a larger one."""
    beside: Path | None = input_path(None)
    """Published pairs to mix these with."""
    seed: int = identity(0, ge=0)
    """Seed of the selection."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beside is not None and self.share == 1:
            raise ValueError("share=1 leaves nothing for the pairs in beside. Lower it.")
        return self
