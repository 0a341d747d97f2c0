"""The scorer kind `logprobs`: log-probabilities of the stored tokens under a causal language model."""

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from annotation.batching import batches
from annotation.config import ScoreConfig
from annotation.loading import compute_facts, load_model, pad_right, require_vocabulary
from annotation.samples import Sample
from contracts.attempt import beat
from contracts.faults import Fault
from contracts.records import Score

LOGITS_AT_ONCE = 1 << 26
"""Logits (positions times vocabulary) in memory at a time: 256 MiB in float32."""


class LogprobModel:
    """Natural log-probabilities at temperature 1 of each response token; a sample's score is their sum."""

    def __init__(self, config: ScoreConfig, longest: int | None) -> None:
        self.path = config.model
        self.budget = config.batch_tokens
        self.longest = longest
        self.model = load_model(config, AutoModelForCausalLM)
        self.facts = compute_facts(self.model)

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample; "too_long" where prompt and response exceed the limit."""
        lengths = [len(sample.rollout.prompt_ids) + len(sample.completion.response_ids) for sample in samples]
        results: list[Score | str | Fault] = ["too_long"] * len(samples)
        fitting = [index for index, length in enumerate(lengths) if self.longest is None or length <= self.longest]
        for batch in batches([lengths[index] for index in fitting], self.budget):
            beat()
            chosen = [samples[fitting[position]] for position in batch]
            for position, logprobs in zip(batch, self._forward(chosen), strict=True):
                index = fitting[position]
                results[index] = samples[index].scored(math.fsum(logprobs), tuple(logprobs))
        return results

    @torch.inference_mode()
    def _forward(self, samples: list[Sample]) -> list[list[float]]:
        """Per-token log-probabilities of one batch, response tokens only."""
        sequences = [[*sample.rollout.prompt_ids, *sample.completion.response_ids] for sample in samples]
        require_vocabulary(self.model, sequences, self.path)
        input_ids_BT, mask_BT = pad_right(sequences, 0, self.model.device)
        sizes = [len(sample.completion.response_ids) for sample in samples]
        # The token at position t is predicted by the output at t - 1.
        rows = [row for row, size in enumerate(sizes) for _ in range(size)]
        targets = [
            position
            for sequence, size in zip(sequences, sizes, strict=True)
            for position in range(len(sequence) - size, len(sequence))
        ]
        rows_N = torch.tensor(rows, dtype=torch.long, device=self.model.device)
        targets_N = torch.tensor(targets, dtype=torch.long, device=self.model.device)
        backbone = getattr(self.model, self.model.base_model_prefix)
        outputs = backbone(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False)
        hidden_NH = outputs.last_hidden_state[rows_N, targets_N - 1]
        labels_N = input_ids_BT[rows_N, targets_N]
        chunk = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        flat: list[float] = []
        for hidden_CH, labels_C in zip(hidden_NH.split(chunk), labels_N.split(chunk), strict=True):
            logprobs_CV = self._head(backbone, outputs, hidden_CH).float().log_softmax(-1)
            flat.extend(logprobs_CV.gather(-1, labels_C[:, None])[:, 0].tolist())
        tokens = iter(flat)
        return [[next(tokens) for _ in range(size)] for size in sizes]

    def _head(self, backbone: Any, outputs: Any, hidden_CH: Any) -> Any:
        """Logits `[C, V]` of chosen positions.

        Some architectures scale or cap what their output matrix gives (Cohere, Granite, Gemma), so the model's own
        forward computes them, with a backbone that answers with these positions instead of running again.
        """
        outputs.last_hidden_state = hidden_CH[None]
        backbone.forward = lambda *args, **kwargs: outputs
        try:
            return self.model(inputs_embeds=hidden_CH[None]).logits[0]
        finally:
            del backbone.forward
