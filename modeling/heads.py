"""Determines how a causal model scales and caps its logits: inferred from its config, verified by measurement."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from contracts.errors import UserError
from modeling.logprobs import LogitScaling, scale_logits
from modeling.modes import gathered

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Config entries that scale logits; some architectures multiply by them, some divide."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
MAGNITUDES = (2.0, 200.0)
"""Magnitudes of the probed logits: large ones reveal soft-capping, small ones everything else."""


class _States(BaseModelOutputWithPast):
    """A backbone's output that has the given hidden states, and None as every other attribute."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def backbone_of(model: Any) -> Any:
    """The submodule of a transformers model whose last hidden states its head reads."""
    backbone = model.base_model
    if backbone is model:  # base_model_prefix names a module that the model does not have (Llama 4)
        backbone = model.model
    inner = getattr(backbone, "decoder", None)  # OPT's head calls this and not the module around it
    return inner if isinstance(inner, nn.Module) and not model.config.is_encoder_decoder else backbone


@torch.no_grad()
def logit_scaling(model: Any) -> LogitScaling:
    """The scaling and soft-capping that a causal model applies after its LM head.

    Candidates come from its config; the model's own forward on given hidden states decides among them.

    Raises:
        UserError: no candidate matches, so log-probabilities would be silently wrong.
    """
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise _unknown(model)
    with gathered([*head.parameters()]), _with_values(head):
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, 4, head.weight.shape[-1], generator=generator).to(head.weight)
        unit = states / _linear(head, states).abs().max().clamp(min=torch.finfo(torch.float32).tiny).to(states)
        probes = [magnitude * unit for magnitude in MAGNITUDES]
        plain = [_linear(head, hidden) for hidden in probes]
        actual = [_own_logits(model, hidden) for hidden in probes]
    for scaling in _candidates(model.config.get_text_config()):
        expected = [scale_logits(linear, scaling) for linear in plain]
        if all(
            float((one - other).abs().max()) <= 1e-2 * float(other.abs().max())
            for one, other in zip(actual, expected, strict=True)
        ):
            return scaling
    raise _unknown(model)


@contextlib.contextmanager
def _with_values(head: Any) -> Iterator[None]:
    """Give a head on the meta device a few random rows inside the block: the scaling of logits does not depend on
    them."""
    weight = head.weight
    if weight.is_meta:
        rows = torch.randn(16, weight.shape[-1], generator=torch.Generator().manual_seed(0))
        head.weight = nn.Parameter(rows.to(weight.dtype), requires_grad=False)
    try:
        yield
    finally:
        head.weight = weight


def _linear(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(hidden, head.weight, getattr(head, "bias", None)).float()


def _own_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    backbone = backbone_of(model)
    backbone.forward = lambda *args, **kwargs: _States(last_hidden_state=hidden)
    try:
        logits: torch.Tensor = model(inputs_embeds=hidden, use_cache=False).logits.float()
    except (AttributeError, TypeError, ValueError) as error:
        raise _unknown(model) from error
    finally:
        del backbone.forward
    return logits


def _candidates(config: Any) -> list[LogitScaling]:
    scales = [1.0]
    for name in SCALES:
        if value := getattr(config, name, None):
            scales += [float(value), 1 / float(value)]
    if base := getattr(config, "dim_model_base", None):  # MiniCPM: muP's width multiplier
        scales.append(base / config.hidden_size)
    caps = [float(value) for name in CAPS if (value := getattr(config, name, None))]
    return [LogitScaling(scale, cap) for cap, scale in itertools.product([*caps, None], scales)]


def _unknown(model: Any) -> UserError:
    return UserError(
        f"{type(model).__name__} computes its logits in an unsupported way: they are not the output of its LM head for "
        "its last hidden states, scaled or soft-capped as in its config. Choose another model."
    )
