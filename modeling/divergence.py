"""Per-token KL divergences between the full distributions of policy and reference model, without full logits.

The reference is a frozen model in the same process. Logits are computed in chunks of positions and recomputed in the
backward pass, so that the logits of all positions never exist at the same time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 512
"""Positions whose logits (fp32, [CHUNK, vocabulary], several copies for each model) exist at the same time."""


def divergences(
    head: Any, states: Tensor, reference_head: Any, reference_states: Tensor, ids: Tensor
) -> dict[str, Tensor]:
    """Divergences at N positions; each [N], fp32, in nats.

    `kl_to_reference`: sum_v p(v) (log p(v) - log q(v)), with gradient for p, the policy's distribution;
    `kl_from_reference`: sum_v q(v) (log q(v) - log p(v)), likewise; `reference`: log q of the token `ids`.

    Args:
        head: has `logits`: [N, hidden size] -> [N, vocabulary], fp32.
        states: hidden states that predict the tokens, [N, hidden size].
    """
    columns = zip(
        *(
            checkpoint(_chunk, head, own, reference_head, other, tokens, use_reentrant=False, preserve_rng_state=False)
            for own, other, tokens in zip(
                states.split(CHUNK), reference_states.split(CHUNK), ids.split(CHUNK), strict=True
            )
        ),
        strict=True,
    )
    names = ("kl_to_reference", "kl_from_reference", "reference")
    return dict(zip(names, map(torch.cat, columns), strict=True))


def _chunk(
    head: Any, states: Tensor, reference_head: Any, reference_states: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    log_p = head.logits(states).log_softmax(-1)
    with torch.no_grad():
        log_q = reference_head.logits(reference_states).log_softmax(-1)
    difference = log_p - log_q
    own = log_q.gather(-1, ids[:, None]).squeeze(-1)
    return (log_p.exp() * difference).sum(-1), -(log_q.exp() * difference).sum(-1), own
