"""Reads and writes DeepSpeed's weights and moments as unsharded tensors.

All processes call these functions, in the same order.
"""

from typing import Any

import torch
from torch import Tensor, nn


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The unsharded shape of a parameter; under ZeRO-3 the parameter itself is an empty tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def get_weights(parameter: nn.Parameter) -> Tensor:
    """The master weights (fp32), which the optimizer updates."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights: Tensor = safe_get_full_fp32_param(parameter)
    if _is_partitioned(parameter):
        return weights
    # ZeRO-1 and ZeRO-2 sum the shards of all processes, and -0.0 + 0.0 is 0.0; the model's weights have the sign.
    return weights.copysign(parameter.detach())


def set_weights(parameter: nn.Parameter, weights: Tensor) -> None:
    """Replace the master weights and the model's weights, which DeepSpeed would only update in its next step."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, weights)
    with GatheredParameters([parameter], modifier_rank=0, enabled=_is_partitioned(parameter)):
        parameter.data.copy_(weights)


def get_moment(parameter: nn.Parameter, moment: str) -> Tensor:
    """One of the optimizer's moments (fp32); they exist from the first step on."""
    from deepspeed.utils import safe_get_full_optimizer_state

    value: Tensor = safe_get_full_optimizer_state(parameter, moment)
    return value


def set_moment(parameter: nn.Parameter, moment: str, value: Tensor) -> None:
    """Replace one of the optimizer's moments, which must exist."""
    from deepspeed.utils import safe_set_full_optimizer_state

    safe_set_full_optimizer_state(parameter, value, moment)


def set_steps(optimizer: Any, steps: int) -> None:
    """Set the step count of the optimizer that accelerate has prepared."""
    for state in optimizer.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has sharded the parameter."""
    return hasattr(parameter, "ds_id")
