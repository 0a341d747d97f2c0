"""The scorer kind `logprobs`: log-probabilities of the stored tokens under a causal language model."""

from collections.abc import Callable
from typing import ClassVar, Literal

from annotation.scorers.base import ModelScoreConfig, ModelSettings
from annotation.scorers.vocabulary import shared_vocabulary
from contracts.artifacts import Artifact
from contracts.config import identity
from contracts.model_size import Size
from contracts.models import ModelInfo
from contracts.outlook import AnswerStats

LOGITS_AT_ONCE = 1 << 26
"""Maximum number of logits (positions times vocabulary) in memory at a time: 256 MiB in float32."""


class LogprobSettings(ModelSettings):
    """Settings of a scorer that computes log-probabilities."""

    kind: Literal["logprobs"] = identity()
    """A language model's log-probabilities."""

    reader: ClassVar[str] = "annotation.models.logprobs:LogprobModel"
    checks: ClassVar[tuple[Callable[[ModelInfo], None], ...]] = (ModelInfo.require_causal,)
    reads_tokens: ClassVar[bool] = True

    def facts_of(self, rollouts: Artifact) -> dict[str, str]:
        """The vocabulary, if the model is known to share it with the policy."""
        assert self.model is not None
        return shared_vocabulary(self.model, rollouts, required=False)

    def memory(self, size: Size, answers: AnswerStats | None, *, on_gpu: bool) -> dict[str, int]:
        """Memory of the model, plus up to 2^26 logits in three copies."""
        logits = min(LOGITS_AT_ONCE, self.tokens_at_once(answers, on_gpu=on_gpu) * size.vocabulary)
        return super().memory(size, answers, on_gpu=on_gpu) | {
            "logits": logits * (8 + self.bytes_per_number(on_gpu=on_gpu))
        }


class LogprobConfig(LogprobSettings, ModelScoreConfig):
    """Compute the log-probabilities of every completion under a model."""
