"""The trained modules: a transformers model with the head that its loss needs, applied to `Packed` batches."""

from typing import Any

import torch
from torch import Tensor, nn

from modeling.divergence import divergences
from modeling.heads import backbone_of, logit_scaling
from modeling.logprobs import LogprobHead
from modeling.packing import Packed


class Trained(nn.Module):
    """A transformers model (`model`) with a head on its last hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Packed) -> dict[str, Tensor]:
        """The outputs of `read` for a micro-batch."""
        return self.read(self.hidden(batch), batch)

    def hidden(self, batch: Packed) -> Tensor:
        """The last hidden state of every token, [tokens, hidden size]. There is no attention mask: causal attention
        hides right padding, and padded positions are never read."""
        plan = {} if batch.plan is None else {"plan": batch.plan}
        outputs = backbone_of(self.model)(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **plan
        )
        return outputs.last_hidden_state.flatten(0, 1)  # type: ignore[no-any-return]

    def read(self, hidden: Tensor, batch: Packed) -> dict[str, Tensor]:
        """Outputs by name, from the hidden states of the batch."""
        raise NotImplementedError


class TokenLogprobs(Trained):
    """A causal language model: `logprobs` [N] of the response tokens, and `entropy` and `log_collision` on request.

    With a value head (weights [1, hidden size]) it is its own critic and returns the `values` [N] of the states in
    which the response tokens were chosen. With a frozen reference model, which is not part of the module, it also
    returns the outputs of `divergences`.
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
        # In a list, so that it is not registered: neither trained, nor saved, nor sharded.
        self._references = [] if reference is None else [TokenLogprobs(reference.requires_grad_(False).eval())]
        scaling = logit_scaling(model)
        self.head = LogprobHead(model.get_output_embeddings(), scaling, entropy=entropy, collision=collision)
        self.value_head = None
        if value_head is not None:
            self.value_head = nn.Linear(value_head.shape[-1], 1, bias=False)
            self.value_head.weight.data.copy_(value_head)

    def read(self, hidden: Tensor, batch: Packed) -> dict[str, Tensor]:
        """The outputs of `HeadOutput` by name, with `values` and `divergences` if configured."""
        states = hidden[batch.positions]
        head_output = self.head(states, batch.targets)
        outputs = {name: value for name, value in head_output._asdict().items() if value is not None}
        if self.value_head is not None:
            outputs["values"] = self.value_head(states.to(self.value_head.weight.dtype)).float().squeeze(-1)
        for reference in self._references:
            with torch.no_grad():
                others = reference.hidden(batch)[batch.positions]
            outputs |= divergences(self.head, states, reference.head, others, batch.targets)
        return outputs

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the reference along with the policy."""
        for reference in self._references:
            reference._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class SequenceScores(Trained):
    """A sequence classifier with one label: `scores` [S], at each sequence's last token.

    transformers' own forward reads the score at the last token that is not the padding token, which is wrong if padding
    and EOS are the same token.
    """

    def read(self, hidden: Tensor, batch: Packed) -> dict[str, Tensor]:
        """One score per sequence, fp32."""
        return {"scores": self.model.score(hidden[batch.last]).float().squeeze(-1)}


class TokenValues(Trained):
    """A sequence classifier as a critic: `values` [N] of the states in which the response tokens were chosen."""

    def read(self, hidden: Tensor, batch: Packed) -> dict[str, Tensor]:
        """One value per response token, fp32."""
        return {"values": self.model.score(hidden[batch.positions]).float().squeeze(-1)}
