"""Log-probabilities of response tokens, and scores of whole answers, without the memory of full logits.

The hidden states that predict a response token are picked before the LM head, and the head works in chunks that are
computed again in the backward pass: at no time do logits of more than `CHUNK` positions exist.

Sequences are padded on the right and no attention mask is passed: in a causal model nothing before a padded position
can see it, and no padded position is ever picked.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contracts.errors import UserError
from training.data import Sequence

CHUNK = 2048
"""Positions whose logits (fp32, [CHUNK, vocabulary]) exist at the same time."""


class Batch(NamedTuple):
    """Padded sequences and what is picked from them; S sequences of at most T tokens, N response tokens in all."""

    input_ids: Tensor
    """[S, T]"""
    positions: Tensor
    """[N], into the flattened [S * T]: the position that predicts each response token."""
    targets: Tensor
    """[N], the response tokens."""
    lengths: tuple[int, ...]
    """Response tokens of each sequence; they add up to N."""
    last: Tensor
    """[S], into the flattened [S * T]: the last real token of each sequence."""


def collate(sequences: Iterable[Sequence], device: torch.device | str = "cpu") -> Batch:
    """Pad to the longest sequence; the value of the padding is never used."""
    sequences = list(sequences)
    width = max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    positions: list[Tensor] = []
    targets: list[Tensor] = []
    for index, sequence in enumerate(sequences):
        ids = torch.tensor(sequence.ids)
        input_ids[index, : len(ids)] = ids
        positions.append(torch.arange(sequence.start - 1, len(ids) - 1) + index * width)
        targets.append(ids[sequence.start :])
    last = torch.tensor([index * width + len(sequence.ids) - 1 for index, sequence in enumerate(sequences)])
    return Batch(
        input_ids.to(device),
        torch.cat(positions).to(device),
        torch.cat(targets).to(device),
        tuple(sequence.response_length for sequence in sequences),
        last.to(device),
    )


def sum_by_sequence(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[N] -> [S]: the sum over each sequence's response tokens."""
    return torch.stack([part.sum() for part in values.split(lengths)])


class TokenLogprobs(nn.Module):
    """A causal language model as trainers need it: token ids in, log-probabilities of the response tokens out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = LogprobHead(model.get_output_embeddings())

    def forward(self, input_ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Fields of a `Batch` -> [N] natural log-probabilities in fp32, sequence by sequence."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(hidden.flatten(0, 1)[positions], targets)  # type: ignore[no-any-return]


class SequenceScore(nn.Module):
    """A sequence classifier with one label: token ids in, one score per sequence out, read at its last real token.

    transformers' own forward looks for the last token that is not the padding token, which misses the end of an
    answer where padding and EOS are the same token.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Fields of a `Batch` -> [S] scores in fp32."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.model.score(hidden.flatten(0, 1)[last]).float().squeeze(-1)  # type: ignore[no-any-return]


@torch.no_grad()
def require_same_logits(prepared: Any, module: TokenLogprobs, sequence: Sequence, device: torch.device) -> None:
    """Check once that the model's logits are its LM head applied to its last hidden state.

    Some models scale or cap their logits; `TokenLogprobs` would be wrong for these without anybody noticing.

    Raises:
        UserError: this model does.
    """
    batch = collate([sequence], device)
    found = prepared(batch.input_ids, batch.positions, batch.targets)
    logits = module.model(input_ids=batch.input_ids, use_cache=False).logits[0, batch.positions]
    expected = logits.float().log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)
    difference = float((found - expected).abs().mean())
    if difference > (1e-3 if logits.dtype == torch.float32 else 0.1):
        raise UserError(
            f"{type(module.model).__name__} does more to its logits than to apply its LM head (log-probabilities "
            f"differ by {difference:.2g}), for example soft-capping; such models are not supported. Choose another."
        )


class LogprobHead(nn.Module):
    """An LM head that returns log-probabilities of given tokens instead of logits. Shares the head's own weights.

    It is a module that owns these parameters, because ZeRO-3 gathers a parameter when its module is called.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = getattr(head, "bias", None)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [N, hidden size], targets [N] -> [N] in fp32."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return _Logprobs.apply(hidden.to(dtype), self.weight, self.bias, targets)  # type: ignore[no-any-return, no-untyped-call]


class _Logprobs(torch.autograd.Function):
    """log softmax(hidden @ weight^T + bias)[targets], chunk by chunk, forwards and backwards.

    d logprob / d logits = onehot(target) - softmax. The weight itself is saved, not a view of it, so that ZeRO-3 can
    release and gather it in between.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        parts = [
            _logits(chunk, weight, bias).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
            for chunk, ids in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            grad_logits = -_logits(hidden[chunk], weight, bias).softmax(-1)
            grad_logits.scatter_add_(-1, targets[chunk, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits *= gradients[0][chunk, None]
            grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[chunk] = grad_logits @ weight.to(hidden.dtype)
            grad_weight += (grad_logits.T @ hidden[chunk]).float()
        return grad_hidden, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return logits.float()
