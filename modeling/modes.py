"""Model state for training: evaluation mode, gradient checkpointing, gathered parameters under ZeRO-3."""

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
    """Context with gathered parameters under ZeRO-3; changes by rank `modifier` are broadcast. Otherwise a no-op."""
    if not any(map(is_partitioned, parameters)):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier)


def set_modes(model: Any, gradient_checkpointing: bool) -> None:
    """Evaluation mode, so that no kind of dropout is active; with gradient checkpointing if asked for."""
    model.eval()
    if gradient_checkpointing:
        from transformers.modeling_layers import GradientCheckpointingLayer

        model.gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # transformers checkpoints only layers in training mode, in which some apply dropout.
                module.training = True
                module._gradient_checkpointing_func = functools.partial(_recomputed, module)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    """`forward` of a layer in evaluation mode, with gradient checkpointing."""

    def evaluated(*inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(evaluated, *inputs, use_reentrant=False)
