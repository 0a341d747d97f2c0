"""Fixes the frequencies of rotary embeddings that would otherwise depend on the longest sequence of a batch.

transformers applies the short or the long factors of longrope (Phi-3.5, Phi-4-mini) to a batch by its longest sequence,
so a sequence's log-probabilities would depend on the rest of the batch. Here the choice depends on the model: one whose
context is longer than its original one (`original_max_position_embeddings`) uses the long factors for every sequence,
like vLLM when it serves that context. Dynamic NTK does not change the frequencies within `max_position_embeddings`, in
vLLM either, and no stage computes longer sequences, so they stay as they are.
"""

import copy
import functools
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ENDLESS = 1 << 62


def fix_rope(model: Any) -> None:
    """Make the rotary embeddings of a loaded model independent of the batch, in place."""
    for module in model.modules():
        rope_types = getattr(module, "rope_type", None)
        if isinstance(rope_types, str):
            _fix(module, rope_types, None)
        elif isinstance(rope_types, dict):
            for layer_type, rope_type in rope_types.items():
                _fix(module, rope_type, layer_type)


def _fix(module: Any, rope_type: str, layer_type: str | None) -> None:
    prefix = "" if layer_type is None else f"{layer_type}_"
    if "dynamic" in rope_type:
        setattr(module, f"{prefix}max_seq_len_cached", ENDLESS)
        module.original_max_seq_len = 0  # no sequence is shorter, so the frequencies are never reset
    elif rope_type == "longrope":
        config = module.config
        settings = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        original = settings["original_max_position_embeddings"]
        if config.max_position_embeddings <= original:
            return
        current = getattr(module, f"{prefix}inv_freq")
        compute = functools.partial(ROPE_INIT_FUNCTIONS[rope_type], seq_len=original + 1, layer_type=layer_type)
        if "long_mscale" in settings:  # PhiMoE recomputes them in every forward pass, with a magnitude by length
            module.rope_init_fn = compute
            module.config = copy.deepcopy(config)
            module.config.rope_parameters["short_mscale"] = settings["long_mscale"]
        long, _ = compute(config, current.device)
        current.copy_(long)
        setattr(module, f"{prefix}original_inv_freq", long.clone())
