"""What is trained: a transformers model with the head that its loss needs, in terms of `Packed` batches."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from contracts.errors import UserError
from modeling.divergence import divergences
from modeling.logprobs import LogprobHead
from modeling.modes import gathered
from modeling.packing import Packed


class Trained(nn.Module):
    """A transformers model (`model`) whose last hidden states are read by a head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Packed) -> dict[str, Tensor]:
        """The outputs of `read` for a micro-batch."""
        return self.read(self.hidden(batch), batch)

    def hidden(self, batch: Packed) -> Tensor:
        """The last hidden state of every token, [tokens, hidden size]. No attention mask: in a causal model nothing
        before a padded position sees it, and no padded position is ever read."""
        plan = {} if batch.plan is None else {"plan": batch.plan}
        outputs = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **plan
        )
        return outputs.last_hidden_state.flatten(0, 1)  # type: ignore[no-any-return]

    def read(self, hidden: Tensor, batch: Packed) -> dict[str, Tensor]:
        """Outputs by name, from all hidden states of the batch."""
        raise NotImplementedError


class TokenLogprobs(Trained):
    """A causal language model: `logprobs` [N] of the response tokens, and `entropy` and `log_collision` if wanted.

    With a value head (weights [1, hidden size]) it is its own critic: `values` [N] of the states in which the response
    tokens were chosen. With a reference model, which is no part of the module and never learns, it gives `divergences`.
    """

    def __init__(
        self,
        model: Any,
        *,
        entropy: bool = False,
        collision: bool = False,
        value_head: Tensor | None = None,
        reference: Any = None,
    ) -> None:
        super().__init__(model)
        # In a list, so that it is neither trained nor saved, nor spread over processes.
        self._references = [] if reference is None else [TokenLogprobs(reference.requires_grad_(False).eval())]
        self.head = LogprobHead(model.get_output_embeddings(), entropy=entropy, collision=collision)
        self.value_head = None
        if value_head is not None:
            self.value_head = nn.Linear(value_head.shape[-1], 1, bias=False)
            self.value_head.weight.data.copy_(value_head)

    def read(self, hidden: Tensor, batch: Packed) -> dict[str, Tensor]:
        """See `TokenFigures`."""
        states = hidden[batch.positions]
        found = self.head(states, batch.targets)
        outputs = {name: value for name, value in found._asdict().items() if value is not None}
        if self.value_head is not None:
            outputs["values"] = self.value_head(states.to(self.value_head.weight.dtype)).float().squeeze(-1)
        for reference in self._references:
            with torch.no_grad():
                others = reference.hidden(batch)[batch.positions]
            outputs |= divergences(self.head, states, reference.head, others, batch.targets)
        return outputs

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The reference goes where the policy goes."""
        for reference in self._references:
            reference._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class SequenceScores(Trained):
    """A sequence classifier with one label: `scores` [S], read at each sequence's last token.

    transformers' own forward looks for the last token that is not the padding token, which misses the end of an
    answer where padding and EOS are the same token.
    """

    def read(self, hidden: Tensor, batch: Packed) -> dict[str, Tensor]:
        """One score per sequence, fp32."""
        return {"scores": self.model.score(hidden[batch.last]).float().squeeze(-1)}


class TokenValues(Trained):
    """The same classifier as a critic: `values` [N] of the states in which the response tokens were chosen."""

    def read(self, hidden: Tensor, batch: Packed) -> dict[str, Tensor]:
        """One value per response token, fp32."""
        return {"values": self.model.score(hidden[batch.positions]).float().squeeze(-1)}


@torch.no_grad()
def require_plain_head(model: Any) -> None:
    """Check that a causal model's logits are its LM head applied to its last hidden state, and nothing more.

    Some models scale or cap their logits; `TokenLogprobs` would be wrong for these without anybody noticing. The
    model's own forward is asked, with a backbone that answers with given hidden states.

    Raises:
        UserError: this model does more.
    """
    head, backbone = model.get_output_embeddings(), model.base_model
    with gathered([*head.parameters()]):
        size = head.weight.shape[-1]
        generator = torch.Generator().manual_seed(0)
        hidden = 8 * torch.randn(1, 4, size, generator=generator).to(head.weight)
        backbone.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)
        try:
            found = model(inputs_embeds=hidden, use_cache=False).logits.float()
        finally:
            del backbone.forward
        expected = nn.functional.linear(hidden, head.weight, getattr(head, "bias", None)).float()
    if float((found - expected).abs().max()) > 1e-2 * float(expected.abs().max()):
        raise UserError(
            f"{type(model).__name__} does more to its logits than to apply its LM head, for example soft-capping or "
            "scaling; such models are not supported. Choose another."
        )
