"""The scorer kind `pairwise`: a causal language model that says which of two answers to a prompt is better."""

from collections.abc import Callable
from typing import ClassVar, Literal

from annotation.scorers.base import ChatScoreConfig, ComparingConfig, ComparingSettings
from annotation.scorers.pooling import PooledSettings
from contracts.config import identity
from contracts.model_size import Size
from contracts.models import ModelInfo
from contracts.outlook import TEMPLATE_TOKENS, AnswerStats


class PairwiseSettings(ComparingSettings, PooledSettings):
    """Settings of a pairwise preference model."""

    kind: Literal["pairwise"] = identity()
    """A pairwise preference model; a response's score is its mean probability of being better than others."""

    reader: ClassVar[str] = "annotation.models.pooled:open_pairwise"
    pooled_as: ClassVar[str] = "a pairwise model"
    checks: ClassVar[tuple[Callable[[ModelInfo], None], ...]] = (
        ModelInfo.require_causal,
        ModelInfo.require_chat_template,
    )
    trained_as: ClassVar[str] = "pairwise"

    def memory(self, size: Size, answers: AnswerStats | None, *, on_gpu: bool) -> dict[str, int]:
        """Memory of the model, plus the logits of the last token of each comparison, which has at least 64 tokens."""
        logits = -(-self.tokens_at_once(answers, on_gpu=on_gpu) // TEMPLATE_TOKENS) * size.vocabulary
        return super().memory(size, answers, on_gpu=on_gpu) | {
            "logits": logits * (4 + self.bytes_per_number(on_gpu=on_gpu))
        }

    def tokens_of(self, answers: AnswerStats) -> tuple[int, int]:
        """Tokens of the comparisons for one prompt, and of all comparisons."""
        of_prompt = answers.k * (self.opponents or max(1, answers.k - 1)) * answers.question_tokens
        return of_prompt, answers.prompts.count * of_prompt


class PairwiseConfig(PairwiseSettings, ComparingConfig, ChatScoreConfig):
    """Score every completion with a pairwise preference model."""
