"""What scorers of the stored token ids share: their rows, and the positions whose outputs speak of response tokens."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from annotation.models.batching import by_rollout
from annotation.models.loading import pad_right, require_vocabulary
from annotation.models.reading import ModelReader
from annotation.samples import Sample
from contracts.faults import Fault
from contracts.records import Score
from modeling.heads import backbone_of
from modeling.packing import Packed
from modeling.rows import Response, Row, token_ids


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


class TokenScorer(ModelReader):
    """Judges the stored ids, prompt and response as they are, without a chat template."""

    per_token: ClassVar[bool] = True

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample; "too_long" where prompt and response exceed the limit."""
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
                results[index] = self.judge(samples[index], own)
        return results

    def packed_numbers(self, batch: Packed, hidden: Any) -> list[float]:
        """What is said of each response token, by the state before it."""
        return self.packed_tokens(hidden[batch.positions], batch.targets)

    def padded_numbers(self, sequences: list[list[int]], sizes: list[int]) -> list[float]:
        """The same."""
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
        """The model without its head, what it puts out, and its last hidden state before each token [N, H]."""
        backbone, outputs = run_backbone(self.model, batch.input_ids, batch.mask)
        return backbone, outputs, outputs.last_hidden_state[batch.rows, batch.targets - 1]

    def packed_tokens(self, states: Any, targets: Any) -> list[float]:
        """What the model says of N tokens, by the last hidden states before them [N, hidden size]."""
        raise NotImplementedError

    def numbers(self, batch: Batch) -> list[float]:
        """The same of a padded batch."""
        raise NotImplementedError

    def judge(self, sample: Sample, numbers: list[float]) -> Score | str:
        """A sample's score by the numbers of its tokens, or the reason for which it is dropped."""
        raise NotImplementedError
