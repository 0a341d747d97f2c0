"""Attention of flat batches, as a function that transformers' models call in place of their own."""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from modeling.packing import Plan

NAME = "packed"
PACKABLE = frozenset(
    "cohere ernie4_5 glm4 granite helium hunyuan_v1_dense llama mistral olmo olmo2 phi3 qwen2 qwen3 "
    "seed_oss smollm3".split()
)
"""Model types whose flat batches a test compares with padded ones."""


def is_packable(config: Any, longest: int) -> bool:
    """Whether a model computes flat batches right: a known architecture whose attention window covers `longest`."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return text.model_type in PACKABLE and (window is None or longest <= window)


def use_packed_attention(model: Any) -> None:
    """Have a transformers model compute its attention by the `Plan` of each batch."""
    model.config.get_text_config()._attn_implementation = NAME
    model.config._attn_implementation = NAME


def is_packed(model: Any) -> bool:
    """Whether a model's attention is that of flat batches."""
    return bool(model.config._attn_implementation == NAME)


def attention_on(device: torch.device, dtype: torch.dtype) -> str:
    """What computes the attention of flat batches: `flash_attn` on a GPU where it is installed, else `sdpa`."""
    return "flash_attn" if device.type == "cuda" and dtype != torch.float32 and _flash_is_installed() else "sdpa"


@functools.cache
def _flash_is_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: Plan,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside of every sequence of a flat batch.

    Args:
        query: [1, heads, T, head size]; key and value with as many heads or fewer (grouped queries).
        plan: which tokens are a sequence.

    Returns:
        [1, T, heads, head size], as transformers expects it, and no weights.
    """
    device = query.device.type
    # Under autocast, rotary embeddings leave queries and keys in fp32.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))  # [T, heads, head size]
    compute = _flash if attention_on(query.device, dtype) == "flash_attn" else _sdpa
    parts = []
    for index in plan.groups:
        shape = (*index.shape, -1, query.shape[-1])
        q, k, v = (tensor.index_select(0, index.flatten()).view(shape) for tensor in (query, key, value))
        parts.append(compute(q, k, v, scaling).flatten(0, 1))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.index_select(0, plan.order)[None], None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    """[S, W, heads, head size] each; what is padded behind a sequence's end comes after all that sees it."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    grouped = k.shape[1] != q.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    """The same by flash-attn."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    found: Tensor = flash_attn_func(q, k, v, softmax_scale=scaling, causal=True)
    return found


AttentionInterface.register(NAME, attend)
