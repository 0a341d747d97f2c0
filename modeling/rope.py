"""Rotary embeddings that choose their frequencies by the longest sequence of a batch, held to one choice.

transformers gives a batch the short or the long factors of longrope (Phi-3.5, Phi-4-mini) by its longest sequence, so
that a sequence's log-probabilities depend on what is beside it. Here the model decides: one whose context is longer
than the one it was first trained with (`original_max_position_embeddings`) takes the long factors for every sequence,
as vLLM does where it serves that context. Dynamic NTK leaves the frequencies alone inside of
`max_position_embeddings`, in vLLM too, and no stage computes longer sequences: they are held there.
"""

import copy
import functools
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ENDLESS = 1 << 62


def hold_rope(model: Any) -> None:
    """Make the rotary embeddings of a loaded model independent of the batch, in place."""
    for module in model.modules():
        rope_types = getattr(module, "rope_type", None)
        if isinstance(rope_types, str):
            _hold(module, rope_types, None)
        elif isinstance(rope_types, dict):
            for layer_type, rope_type in rope_types.items():
                _hold(module, rope_type, layer_type)


def _hold(module: Any, rope_type: str, layer_type: str | None) -> None:
    prefix = "" if layer_type is None else f"{layer_type}_"
    if "dynamic" in rope_type:
        setattr(module, f"{prefix}max_seq_len_cached", ENDLESS)
        module.original_max_seq_len = 0  # nothing is shorter: no reset
    elif rope_type == "longrope":
        config = module.config
        settings = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        original = settings["original_max_position_embeddings"]
        if config.max_position_embeddings <= original:
            return
        current = getattr(module, f"{prefix}inv_freq")
        compute = functools.partial(ROPE_INIT_FUNCTIONS[rope_type], seq_len=original + 1, layer_type=layer_type)
        if "long_mscale" in settings:  # PhiMoE: frequencies anew in every forward pass, and a magnitude by length
            module.rope_init_fn = compute
            module.config = copy.deepcopy(config)
            module.config.rope_parameters["short_mscale"] = settings["long_mscale"]
        long, _ = compute(config, current.device)
        current.copy_(long)
        setattr(module, f"{prefix}original_inv_freq", long.clone())
