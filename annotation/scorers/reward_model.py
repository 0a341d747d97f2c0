"""The scorer kind `reward_model`: a Bradley-Terry model, which is a sequence classifier with one label, read at the
last token of the conversation."""

from collections.abc import Callable
from typing import ClassVar, Literal

from annotation.scorers.base import ChatScoreConfig, RewardScorerSettings
from annotation.scorers.pooling import PooledSettings
from contracts.config import identity
from contracts.models import ModelInfo


class RewardModelSettings(RewardScorerSettings, PooledSettings):
    """Settings of a Bradley-Terry model."""

    kind: Literal["reward_model"] = identity()
    """A Bradley-Terry model."""

    reader: ClassVar[str] = "annotation.models.pooled:open_reward_model"
    pooled_as: ClassVar[str] = "a reward model"
    checks: ClassVar[tuple[Callable[[ModelInfo], None], ...]] = (
        ModelInfo.require_one_label,
        ModelInfo.require_chat_template,
    )
    as_classifier: ClassVar[bool] = True
    trained_as: ClassVar[str] = "bradley_terry"
    starts_critic: ClassVar[bool] = True


class RewardModelConfig(RewardModelSettings, ChatScoreConfig):
    """Score every completion with a Bradley-Terry model."""
