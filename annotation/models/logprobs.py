"""The scorer kind `logprobs`: log-probabilities of the stored tokens under a causal language model."""

import math
from typing import Any

from annotation.models.tokens import Batch, TokenScorer, head_logits
from annotation.samples import Sample
from annotation.scorers.logprobs import LOGITS_AT_ONCE, LogprobConfig
from contracts.records import Score
from modeling.loading import load_causal

CPU_LOGITS = 1 << 22
"""Maximum number of logits in memory at a time on a CPU."""


class LogprobModel(TokenScorer):
    """Natural log-probabilities at temperature 1 of each response token; a sample's score is their sum."""

    def __init__(self, config: LogprobConfig, longest: int | None) -> None:
        super().__init__(config, longest, load_causal)
        at_once = min(LOGITS_AT_ONCE, CPU_LOGITS) if self.model.device.type == "cpu" else LOGITS_AT_ONCE
        self.chunk = max(1, at_once // self.model.config.get_text_config().vocab_size)
        self.share_prompts_before_head()

    def to_score(self, sample: Sample, numbers: list[float]) -> Score:
        """The score record: the sum of the log-probabilities, and each of them."""
        return sample.scored(math.fsum(numbers), token_logprobs=tuple(numbers))

    def packed_tokens(self, states: Any, targets: Any) -> list[float]:
        """Log-probability of each response token."""
        flat: list[float] = []
        for states_CH, targets_C in zip(states.split(self.chunk), targets.split(self.chunk), strict=True):
            flat.extend(self.head(states_CH, targets_C).logprobs.tolist())
        return flat

    def numbers(self, batch: Batch) -> list[float]:
        """Log-probability of each response token of a padded batch."""
        backbone, outputs, hidden_NH = self.run_backbone(batch)
        labels_N = batch.input_ids[batch.rows, batch.targets]
        flat: list[float] = []
        for hidden_CH, labels_C in zip(hidden_NH.split(self.chunk), labels_N.split(self.chunk), strict=True):
            logprobs_CV = head_logits(self.model, backbone, outputs, hidden_CH).float().log_softmax(-1)
            flat.extend(logprobs_CV.gather(-1, labels_C[:, None])[:, 0].tolist())
        return flat
