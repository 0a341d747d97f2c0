"""Log-probabilities of response tokens without the memory of full logits.

The hidden states that predict response tokens are selected before the LM head, which runs in chunks: logits of more
than `CHUNK` positions never exist at the same time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CHUNK = 2048
"""Positions whose logits (fp32, [CHUNK, vocabulary]) exist at the same time."""


class HeadOutput(NamedTuple):
    """The head's outputs for N target tokens; each of shape [N], fp32, in nats."""

    logprobs: Tensor
    """log p(token)"""
    entropy: Tensor | None
    """- sum_v p(v) log p(v)"""
    log_collision: Tensor | None
    """log sum_v p(v)^2, without gradient"""


class LogitScaling(NamedTuple):
    """A model's transformation of the LM head's output z into logits: `cap * tanh(scale * z / cap)`."""

    scale: float = 1.0
    """The factor on z, as in Cohere and Granite."""
    cap: float | None = None
    """The limit of soft-capping, as in Gemma 2 (arXiv 2408.00118); None: the logits are `scale * z`."""


PLAIN = LogitScaling()


class LogprobHead(nn.Module):
    """An LM head that returns log-probabilities of target tokens instead of logits. It shares the LM head's weights.

    It is a module that owns these parameters because ZeRO-3 gathers a parameter when its module is called.
    """

    def __init__(
        self, head: Any, scaling: LogitScaling = PLAIN, *, entropy: bool = False, collision: bool = False
    ) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = getattr(head, "bias", None)
        self.scaling = scaling
        self.entropy = entropy
        self.collision = collision

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits at once, differentiable: [N, hidden size] -> [N, vocabulary], fp32."""
        return _logits(hidden.to(self._dtype(hidden)), self.weight, self.bias, self.scaling)

    def _dtype(self, hidden: Tensor) -> torch.dtype:
        device = hidden.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype

    def forward(self, hidden: Tensor, targets: Tensor) -> HeadOutput:
        """Log-probabilities of the targets [N] from hidden states [N, hidden size]."""
        columns: tuple[Tensor, ...] = _Head.apply(  # type: ignore[no-untyped-call]
            hidden.to(self._dtype(hidden)), self.weight, self.bias, targets, self.scaling, self.entropy, self.collision
        )
        return HeadOutput(columns[0], columns[1] if self.entropy else None, columns[2] if self.collision else None)


class _Head(torch.autograd.Function):
    """`HeadOutput` of softmax(f(hidden @ weight^T + bias)), forward and backward in chunks; f is `LogitScaling`.

    With p the softmax, z the logits and H the entropy:

        d log p(t) / d z = onehot(t) - p          d H / d z = -p (log p + H)

    and through f, with z = f(y): d z / d y = scale (1 - (z / cap)^2).

    With a single chunk and without a cap, p is kept for the backward pass; otherwise it is recomputed. The weight
    itself is saved, not a view of it, so that ZeRO-3 can release and gather it in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scaling: LogitScaling,
        entropy: bool,
        collision: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        columns: list[tuple[Tensor, ...]] = []
        p = None
        for chunk, ids in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = _logits(chunk, weight, bias, scaling)
            p = logits.softmax(-1)
            # log sum exp z = max z - log max p: just as exact, and far cheaper than another pass of exponentials.
            normaliser = logits.amax(-1) - p.amax(-1).log()
            columns.append(
                (
                    logits.gather(-1, ids[:, None]).squeeze(-1) - normaliser,
                    normaliser - (p * logits).sum(-1) if entropy else normaliser[:0],
                    p.square().sum(-1).log() if collision else normaliser[:0],
                )
            )
        logprobs, entropies, collisions = map(torch.cat, zip(*columns, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, entropies)
        ctx.scaling = scaling
        ctx.p = p if len(columns) == 1 and scaling.cap is None and any(ctx.needs_input_grad) else None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(collisions)
        return logprobs, entropies, collisions

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        of_logprobs, of_entropy, _ = gradients
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if wants_bias else None
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            kept, ctx.p = ctx.p, None  # it becomes the gradient, in place
            logits = _logits(hidden[chunk], weight, bias, ctx.scaling) if kept is None else None
            p = kept if logits is None else logits.softmax(-1)
            scale = torch.zeros_like(p[:, 0]) if of_logprobs is None else -of_logprobs[chunk]
            if of_entropy is not None:
                # p log p is 0 where p is.
                surprise = p.clamp(min=torch.finfo(p.dtype).tiny).log() + entropies[chunk, None]
                grad_logits = p.mul_(scale[:, None] - of_entropy[chunk, None] * surprise)
            else:
                grad_logits = p.mul_(scale[:, None])
            if of_logprobs is not None:
                grad_logits.scatter_add_(-1, targets[chunk, None], of_logprobs[chunk, None])
            if ctx.scaling.cap is not None and logits is not None:
                grad_logits.mul_(1 - (logits / ctx.scaling.cap).square())
            if ctx.scaling.scale != 1:
                grad_logits.mul_(ctx.scaling.scale)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight.to(hidden.dtype), out=grad_hidden[chunk])
            if grad_weight is not None:
                if hidden.dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.T, hidden[chunk])
                else:
                    grad_weight += (grad_logits.T @ hidden[chunk]).float()
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: LogitScaling) -> Tensor:
    linear = nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return scale_logits(linear.float(), scaling)


def scale_logits(linear: Tensor, scaling: LogitScaling) -> Tensor:
    """Logits from the LM head's linear output."""
    logits = linear if scaling.scale == 1 else scaling.scale * linear
    return logits if scaling.cap is None else scaling.cap * (logits / scaling.cap).tanh()
