"""Attention over packed (flat) batches, registered as an attention implementation of transformers."""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from modeling.packing import PackingPlan

NAME = "packed"
QUERIES = 64
"""Queries per attention call in `attend_once` where it needs a mask. A block of queries reads keys only up to its own
end, which avoids most of the scores that the mask would hide."""


def use_packed_attention(model: Any) -> None:
    """Switch a transformers model to packed attention, which takes the `PackingPlan` of each batch."""
    model.config.get_text_config()._attn_implementation = NAME
    model.config._attn_implementation = NAME


def is_packed(model: Any) -> bool:
    """Whether a model uses packed attention."""
    return bool(model.config._attn_implementation == NAME)


def attention_on(device: torch.device, dtype: torch.dtype) -> str:
    """The kernel for packed attention.

    On a GPU in half precision it is a variable-length kernel without padding: `flash_attn` if installed, otherwise
    torch's `varlen`. Elsewhere it is `sdpa` on padded groups, which is also the fallback for what a variable-length
    kernel does not support (attention sinks, and soft-capping in torch's kernel).
    """
    if device.type != "cuda" or dtype == torch.float32:
        return "sdpa"
    if _is_installed("flash_attn"):
        return "flash_attn"
    fits = torch.cuda.get_device_capability(device) >= (8, 0)
    return "varlen" if fits and _is_installed("torch.nn.attention.varlen") else "sdpa"


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class AttentionVariant(NamedTuple):
    """A layer's attention variant, in addition to the causal mask."""

    scaling: float | None
    """Scale of the scores; None: 1 / sqrt(head size)."""
    window: int | None
    """Sliding window in tokens, the query's own included; None: full attention."""
    softcap: float | None
    """Scores s become softcap * tanh(s / softcap), as in Gemma 2."""
    sinks: Tensor | None
    """[heads]: logits of attention sinks, as in gpt-oss."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: PackingPlan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a flat batch.

    Args:
        query: [1, heads, T, head size]; key and value with as many heads or fewer (grouped queries).
        plan: the sequences' tokens.
        scaling, sliding_window, softcap, s_aux: the fields of `AttentionVariant`, under transformers' names.

    Returns:
        [1, T, heads, head size], as transformers expects it, and None in place of the attention weights.
    """
    device = query.device.type
    # Under autocast, rotary embeddings leave queries and keys in fp32.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))  # [T, heads, head size]
    # A window that no sequence exceeds has no effect.
    window = sliding_window if sliding_window is not None and sliding_window < plan.longest else None
    variant = AttentionVariant(scaling, window, softcap, s_aux)
    kernel = attention_on(query.device, dtype)
    if kernel != "sdpa" and _fits(kernel, variant, query, value):
        compute = _flash if kernel == "flash_attn" else _varlen
        q, k, v = (tensor.index_select(0, plan.whole) for tensor in (query, key, value))
        return compute(q, k, v, variant, plan).index_select(0, plan.whole_order)[None], None
    explicit = softcap is not None or s_aux is not None
    if plan.spans and device == "cpu" and not explicit:
        return attend_once(query, key, value, variant, plan)[None], None
    group = _explicit if explicit else _sdpa
    parts = []
    for index in plan.groups:
        q, k, v = (
            tensor.index_select(0, index.flatten()).view(*index.shape, *tensor.shape[1:])
            for tensor in (query, key, value)
        )
        parts.append(group(q, k, v, variant).flatten(0, 1))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.index_select(0, plan.order)[None], None


def attend_once(query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant, plan: PackingPlan) -> Tensor:
    """Compute attention over the `spans` of a flat batch, [T, heads, head size] each, without padding and with every
    token as a query exactly once.

    A prompt attends to itself; a response attends to its prompt and to itself.
    """
    output = query.new_empty(*query.shape[:2], value.shape[-1])
    q, k, v, out = (tensor.transpose(0, 1)[None] for tensor in (query, key, value, output))  # [1, heads, T, head size]
    grouped = k.shape[1] != q.shape[1]
    for span in plan.spans:
        for own, before in ((span.prompt, slice(0, 0)), *((own, span.prompt) for own in span.responses)):
            width, length = before.stop - before.start, own.stop - own.start
            if not length:
                continue
            keys, values = _keys_with_prefix(before, own, k, v)
            windowed = variant.window is not None and variant.window < width + length
            mask = _mask_with_prefix(width, length, variant.window, q, plan) if width or windowed else None
            for first in range(0, length, length if mask is None else QUERIES):
                end = length if mask is None else min(first + QUERIES, length)
                queries = slice(own.start + first, own.start + end)
                out[:, :, queries] = scaled_dot_product_attention(
                    q[:, :, queries], keys[:, :, : width + end], values[:, :, : width + end],
                    attn_mask=None if mask is None else mask[first:end, : width + end], is_causal=mask is None,
                    scale=variant.scaling, enable_gqa=grouped,
                )  # fmt: skip
    return output


def attend_once_last_token(
    query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant, plan: PackingPlan
) -> Tensor:
    """Compute `attend_once` for only the last token of each of S sequences: query [S, heads, head size]."""
    output = query.new_empty(*query.shape[:2], value.shape[-1])
    q, k, v, out = (tensor.transpose(0, 1)[None] for tensor in (query, key, value, output))
    grouped = k.shape[1] != q.shape[1]
    sequences = ((span.prompt, own) for span in plan.spans for own in span.responses)
    for index, (before, own) in enumerate(sequences):
        keys, values = _keys_with_prefix(before, own, k, v)
        seen = slice(-min(keys.shape[2], variant.window or keys.shape[2]), None)
        out[:, :, index : index + 1] = scaled_dot_product_attention(
            q[:, :, index : index + 1], keys[:, :, seen], values[:, :, seen], scale=variant.scaling, enable_gqa=grouped
        )
    return output


def _keys_with_prefix(before: slice, own: slice, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [1, heads, tokens, head size] of the prefix `before` followed by `own`."""
    if before.start == before.stop:
        return key[:, :, own], value[:, :, own]
    keys, values = (torch.cat([each[:, :, before], each[:, :, own]], dim=2) for each in (key, value))
    return keys, values


def _mask_with_prefix(width: int, length: int, window: int | None, q: Tensor, plan: PackingPlan) -> Tensor:
    """The additive attention mask [length, width + length] for `length` tokens that follow a prefix of `width`
    tokens."""
    key = (width, length, window)
    if key not in plan.masks:
        visible = _visible(width + length, window, q.device)[width:]
        plan.masks[key] = q.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    return plan.masks[key]


def _fits(kernel: str, variant: AttentionVariant, query: Tensor, value: Tensor) -> bool:
    """Whether the variable-length kernel supports this attention."""
    if variant.sinks is not None or query.shape[-1] != value.shape[-1] or query.shape[-1] > 256:
        return False
    return kernel == "flash_attn" or variant.softcap is None


def _flash(q: Tensor, k: Tensor, v: Tensor, variant: AttentionVariant, plan: PackingPlan) -> Tensor:
    """Attention over concatenated sequences, [L, heads, head size] each, by flash-attn."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    output: Tensor = flash_attn_varlen_func(
        q, k, v, plan.bounds, plan.bounds, plan.longest, plan.longest,
        softmax_scale=variant.scaling, causal=True, window_size=_kernel_window(variant), softcap=variant.softcap or 0.0,
    )  # fmt: skip
    return output


def _varlen(q: Tensor, k: Tensor, v: Tensor, variant: AttentionVariant, plan: PackingPlan) -> Tensor:
    """The same as `_flash`, with torch's variable-length kernel."""
    from torch.nn.attention.varlen import varlen_attn

    output: Tensor = varlen_attn(  # type: ignore[assignment]
        q, k, v, plan.bounds, plan.bounds, plan.longest, plan.longest,
        scale=variant.scaling, window_size=_kernel_window(variant), enable_gqa=k.shape[1] != q.shape[1],
    )  # fmt: skip
    return output


def _kernel_window(variant: AttentionVariant) -> tuple[int, int]:
    """The window to the left and right of a token, excluding the token itself, as the kernels expect; -1: unlimited."""
    return (-1 if variant.window is None else variant.window - 1, 0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, variant: AttentionVariant) -> Tensor:
    """Attention over right-padded sequences, [S, W, heads, head size] each; the causal mask hides the padding."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    grouped = k.shape[1] != q.shape[1]
    mask = (
        None
        if variant.window is None or variant.window >= q.shape[2]
        else _visible(q.shape[2], variant.window, q.device)
    )
    output = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=variant.scaling, enable_gqa=grouped
    )
    return output.transpose(1, 2)


def _explicit(q: Tensor, k: Tensor, v: Tensor, variant: AttentionVariant) -> Tensor:
    """The same as `_sdpa`, with materialized scores, for soft-capping and sinks."""
    groups = q.shape[2] // k.shape[2]
    k, v = (tensor.repeat_interleave(groups, dim=2) for tensor in (k, v))
    scaling = q.shape[-1] ** -0.5 if variant.scaling is None else variant.scaling
    scores = torch.einsum("sihd,sjhd->shij", q, k) * scaling
    if variant.softcap is not None:
        scores = variant.softcap * (scores / variant.softcap).tanh()
    scores = scores.masked_fill(~_visible(q.shape[1], variant.window, q.device), torch.finfo(scores.dtype).min)
    if variant.sinks is not None:
        sinks = variant.sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[1]]
    return torch.einsum("shij,sjhd->sihd", weights, v)


def _visible(width: int, window: int | None, device: torch.device) -> Tensor:
    """The mask [width, width]: whether token i attends to token j."""
    positions = torch.arange(width, device=device)
    distance = positions[:, None] - positions
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, attend)
