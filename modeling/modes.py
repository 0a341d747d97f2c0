"""Sets a model up for training: evaluation mode, gradient checkpointing, gathered parameters under ZeRO-3."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has partitioned the parameter."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: list[nn.Parameter], *, modifier: int | None = None) -> Any:
    """A context in which ZeRO-3's parameters are gathered, a no-op otherwise. Changes by rank `modifier` are
    broadcast."""
    if not any(map(is_partitioned, parameters)):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier)


def set_modes(model: Any, gradient_checkpointing: bool) -> None:
    """Set evaluation mode, so that no dropout of any kind is active, and gradient checkpointing if requested."""
    model.eval()
    if gradient_checkpointing:
        from transformers.modeling_layers import GradientCheckpointingLayer

        model.gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # transformers checkpoints only layers in training mode, and in that mode some apply dropout.
                module.training = True
                module._gradient_checkpointing_func = functools.partial(_recomputed, module)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer's `forward` in evaluation mode, with gradient checkpointing."""

    def evaluated(*inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(evaluated, *inputs, use_reentrant=False)
