"""What scorers of the stored token ids share: batches, and the positions whose outputs speak of response tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from annotation.batching import batches
from annotation.config import ScoreConfig
from annotation.loading import compute_facts, load_model, pad_right, require_vocabulary
from annotation.samples import Sample
from contracts.attempt import beat
from contracts.faults import Fault
from contracts.records import Score
from modeling.heads import backbone_of


@dataclass(frozen=True)
class Batch:
    """B sequences of at most T tokens, with the places of their N response tokens, one answer after the other."""

    input_ids: Any
    """[B, T], padded at the right; so is:"""
    mask: Any
    rows: Any
    """Row of each response token, [N]."""
    targets: Any
    """Position of each response token; what the model makes of the state before it is its output one position
    earlier. [N]"""
    sizes: list[int]
    """Response tokens of each row."""

    def divide(self, numbers: list[float]) -> list[list[float]]:
        """One number per response token as one list per row."""
        tokens = iter(numbers)
        return [[next(tokens) for _ in range(size)] for size in self.sizes]


def run_backbone(model: Any, input_ids: Any, mask: Any) -> tuple[Any, Any]:
    """The model without its head, and what it puts out for a batch [B, T]."""
    backbone = backbone_of(model)
    return backbone, backbone(input_ids=input_ids, attention_mask=mask, use_cache=False)


def head_logits(model: Any, backbone: Any, outputs: Any, hidden_CH: Any) -> Any:
    """Logits `[C, V]` of chosen positions, by their last hidden states.

    Some architectures scale or cap what their output matrix gives (Cohere, Granite, Gemma), so the model's own
    forward computes them, with a backbone that answers with these positions instead of running again.
    """
    outputs.last_hidden_state = hidden_CH[None]
    backbone.forward = lambda *args, **kwargs: outputs
    try:
        return model(inputs_embeds=hidden_CH[None]).logits[0]
    finally:
        del backbone.forward


class TokenScorer:
    """Judges the stored ids, prompt and response as they are, without a chat template."""

    def __init__(self, config: ScoreConfig, longest: int | None, load: Callable[[Path, torch.dtype], Any]) -> None:
        self.path = config.model
        self.budget = config.batch_tokens
        self.longest = longest
        self.model = load_model(config, load)
        self.facts = compute_facts(self.model)
        self.counts: dict[str, int] = {}

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample; "too_long" where prompt and response exceed the limit."""
        lengths = [len(sample.rollout.prompt_ids) + len(sample.completion.response_ids) for sample in samples]
        results: list[Score | str | Fault] = ["too_long"] * len(samples)
        fitting = [index for index, length in enumerate(lengths) if self.longest is None or length <= self.longest]
        for batch in batches([lengths[index] for index in fitting], self.budget):
            beat()
            chosen = [samples[fitting[position]] for position in batch]
            for position, sample, numbers in zip(batch, chosen, self._forward(chosen), strict=True):
                results[fitting[position]] = self.judge(sample, numbers)
        return results

    @torch.inference_mode()
    def _forward(self, samples: list[Sample]) -> list[list[float]]:
        batch = self._collate(samples)
        return batch.divide(self.numbers(batch))

    def _collate(self, samples: list[Sample]) -> Batch:
        sequences = [[*sample.rollout.prompt_ids, *sample.completion.response_ids] for sample in samples]
        require_vocabulary(self.model, sequences, self.path)
        device = self.model.device
        sizes = [len(sample.completion.response_ids) for sample in samples]
        rows = [row for row, size in enumerate(sizes) for _ in range(size)]
        targets = [
            position
            for sequence, size in zip(sequences, sizes, strict=True)
            for position in range(len(sequence) - size, len(sequence))
        ]
        return Batch(
            *pad_right(sequences, 0, device),
            torch.tensor(rows, dtype=torch.long, device=device),
            torch.tensor(targets, dtype=torch.long, device=device),
            sizes,
        )

    def run_backbone(self, batch: Batch) -> tuple[Any, Any, Any]:
        """The model without its head, what it puts out, and its last hidden state before each token [N, H]."""
        backbone, outputs = run_backbone(self.model, batch.input_ids, batch.mask)
        return backbone, outputs, outputs.last_hidden_state[batch.rows, batch.targets - 1]

    def numbers(self, batch: Batch) -> list[float]:
        """What the model says of each response token, N numbers."""
        raise NotImplementedError

    def judge(self, sample: Sample, numbers: list[float]) -> Score | str:
        """A sample's score by the numbers of its tokens, or the reason for which it is dropped."""
        raise NotImplementedError
