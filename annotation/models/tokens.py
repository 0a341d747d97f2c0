"""Base class of scorers that read the stored token ids, and compute a number for each response token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from annotation.models.batching import by_rollout
from annotation.models.loading import pad_right, require_vocabulary
from annotation.models.reader import ModelReader
from annotation.samples import Sample
from contracts.faults import Fault
from contracts.records import Score
from modeling.heads import backbone_of
from modeling.packing import Packed
from modeling.rows import Response, Row, token_ids


@dataclass(frozen=True)
class Batch:
    """B sequences of at most T tokens, with the positions of their N response tokens, one answer after the other."""

    input_ids: Any
    """Token ids, padded on the right, [B, T]."""
    mask: Any
    """Attention mask, [B, T]."""
    rows: Any
    """Row of each response token, [N]."""
    targets: Any
    """Position of each response token, [N]; the output that predicts it is one position earlier."""


def run_backbone(model: Any, input_ids: Any, mask: Any) -> tuple[Any, Any]:
    """The model without its head, and its outputs for a batch [B, T]."""
    backbone = backbone_of(model)
    return backbone, backbone(input_ids=input_ids, attention_mask=mask, use_cache=False)


def head_logits(model: Any, backbone: Any, outputs: Any, hidden_CH: Any) -> Any:
    """Logits `[C, V]` of selected positions, computed from their last hidden states.

    Some architectures scale or cap their logits (Cohere, Granite, Gemma), so the model's own forward pass computes
    them, with a backbone that returns these states instead of running again.
    """
    outputs.last_hidden_state = hidden_CH[None]
    backbone.forward = lambda *args, **kwargs: outputs
    try:
        return model(inputs_embeds=hidden_CH[None]).logits[0]
    finally:
        del backbone.forward


class TokenScorer(ModelReader):
    """Scores the stored token ids of prompt and response as they are, without a chat template."""

    per_token: ClassVar[bool] = True

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample; "too_long" if prompt and response exceed the limit."""
        results: list[Score | str | Fault] = ["too_long"] * len(samples)
        chosen: list[list[int]] = []
        rows: list[Row] = []
        for indices in by_rollout(samples):
            prompt = samples[indices[0]].rollout.prompt_ids
            answers = {index: samples[index].completion.response_ids for index in indices}
            fitting = [
                index for index in indices if self.longest is None or len(prompt) + len(answers[index]) <= self.longest
            ]
            if fitting:
                chosen.append(fitting)
                responses = tuple(Response(token_ids(answers[index])) for index in fitting)
                rows.append(Row("", token_ids(prompt), responses))
        require_vocabulary(self.model, rows, self.path)
        for indices, numbers in zip(chosen, self.read(rows), strict=True):
            for index, own in zip(indices, numbers, strict=True):
                results[index] = self.to_score(samples[index], own)
        return results

    def packed_numbers(self, batch: Packed, hidden: Any) -> list[float]:
        """The number for each response token of a flat batch."""
        return self.packed_tokens(hidden[batch.positions], batch.targets)

    def padded_numbers(self, sequences: list[list[int]], sizes: list[int]) -> list[float]:
        """The number for each response token of a padded batch."""
        device = self.model.device
        rows = [row for row, size in enumerate(sizes) for _ in range(size)]
        targets = [
            position
            for sequence, size in zip(sequences, sizes, strict=True)
            for position in range(len(sequence) - size, len(sequence))
        ]
        batch = Batch(
            *pad_right(sequences, 0, device),
            torch.tensor(rows, dtype=torch.long, device=device),
            torch.tensor(targets, dtype=torch.long, device=device),
        )
        return self.numbers(batch)

    def run_backbone(self, batch: Batch) -> tuple[Any, Any, Any]:
        """The model without its head, its outputs, and the last hidden state before each response token [N, H]."""
        backbone, outputs = run_backbone(self.model, batch.input_ids, batch.mask)
        return backbone, outputs, outputs.last_hidden_state[batch.rows, batch.targets - 1]

    def packed_tokens(self, states: Any, targets: Any) -> list[float]:
        """The numbers for N response tokens, given the last hidden states before them [N, hidden size]."""
        raise NotImplementedError

    def numbers(self, batch: Batch) -> list[float]:
        """The numbers for the response tokens of a padded batch."""
        raise NotImplementedError

    def to_score(self, sample: Sample, numbers: list[float]) -> Score | str:
        """A sample's score, given the numbers for its tokens, or the reason for which it is dropped."""
        raise NotImplementedError
