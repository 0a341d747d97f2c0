"""The scorer kind `logprobs`: log-probabilities of the stored tokens under a causal language model."""

import math

from annotation.config import ScoreConfig
from annotation.samples import Sample
from annotation.tokens import Batch, TokenScorer, head_logits
from contracts.records import Score
from modeling.loading import load_causal

LOGITS_AT_ONCE = 1 << 26
"""Logits (positions times vocabulary) in memory at a time: 256 MiB in float32."""


class LogprobModel(TokenScorer):
    """Natural log-probabilities at temperature 1 of each response token; a sample's score is their sum."""

    def __init__(self, config: ScoreConfig, longest: int | None) -> None:
        super().__init__(config, longest, load_causal)

    def judge(self, sample: Sample, numbers: list[float]) -> Score:
        """The sum."""
        return sample.scored(math.fsum(numbers), token_logprobs=tuple(numbers))

    def numbers(self, batch: Batch) -> list[float]:
        """Log-probability of each response token."""
        backbone, outputs, hidden_NH = self.run_backbone(batch)
        labels_N = batch.input_ids[batch.rows, batch.targets]
        chunk = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        flat: list[float] = []
        for hidden_CH, labels_C in zip(hidden_NH.split(chunk), labels_N.split(chunk), strict=True):
            logprobs_CV = head_logits(self.model, backbone, outputs, hidden_CH).float().log_softmax(-1)
            flat.extend(logprobs_CV.gather(-1, labels_C[:, None])[:, 0].tolist())
        return flat
