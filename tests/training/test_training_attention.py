"""Kernels of variable length, by their interfaces: a reference implementation in the kernel's place, on a CPU."""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_training_architectures import rows
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from torch.nn.attention import varlen

from modeling import attention
from modeling.modules import TokenLogprobs
from modeling.packing import pack

FITTING = {"flash_attn": {"llama", "mistral", "gemma2"}, "varlen": {"llama", "mistral"}}
"""What each kernel computes; gpt-oss has sinks, DeepSeek's heads are uneven, and torch's kernel has no soft-cap."""


def reference(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: tuple[int, int], softcap: float
) -> Tensor:
    """Causal attention by the definition in flash-attn's documentation: query i sees keys i - left to i + right."""
    assert bounds.dtype == torch.int32
    assert int(bounds.diff().max()) == longest
    assert int(bounds[-1]) == len(q) == len(k) == len(v)
    left, right = window
    assert right == 0
    parts = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        one, keys, values = (part[start:end].transpose(0, 1) for part in (q, k, v))
        keys, values = (part.repeat_interleave(len(one) // len(part), 0) for part in (keys, values))
        scores = one @ keys.transpose(1, 2) * scale
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((distance <= left) | torch.tensor(left < 0))
        parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Tensor:  # fmt: skip
    """The signature of flash-attn 2.8."""
    assert causal
    assert dropout_p == 0
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return reference(q, k, v, cu_seqlens_q, max_seqlen_q, scale, window_size, softcap)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The signature of torch 2.13; it hands its window to the same kernel."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return reference(query, key, value, cu_seq_q, max_q, scale, window_size, 0.0)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("kernel", ["flash_attn", "varlen"])
def test_a_kernel_of_variable_length_computes_the_same(
    kernel: str, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **options: Any) -> Tensor:
            calls.append(name)
            return function(*arguments, **options)

        return call

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = counted("flash_attn", flash_attn_varlen_func)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(varlen, "varlen_attn", counted("varlen", varlen_attn))
    model = tiny_model(tiny_config(model_type))
    attention.use_packed_attention(model)
    found = {}
    for name in ("sdpa", kernel):
        monkeypatch.setattr(attention, "attention_on", lambda *_, name=name: name)
        model.zero_grad()
        logprobs = TokenLogprobs(model)(pack(rows(), "shared"))["logprobs"]
        logprobs.sum().backward()
        found[name] = [logprobs.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]
    for one, other in zip(found[kernel], found["sdpa"], strict=True):
        assert float((one - other).abs().max()) < 1e-5 + 1e-3 * float(other.abs().max())
    assert set(calls) == ({kernel} if model_type in FITTING[kernel] else set())


def test_what_computes_attention_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """By device, number format, what is installed, and the card."""
    installed = {"torch.nn.attention.varlen"}
    monkeypatch.setattr(attention, "_is_installed", lambda module: module in installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    gpu, half = torch.device("cuda"), torch.bfloat16
    assert attention.attention_on(torch.device("cpu"), half) == "sdpa"
    assert attention.attention_on(gpu, torch.float32) == "sdpa"
    assert attention.attention_on(gpu, half) == "varlen"
    installed.add("flash_attn")
    assert attention.attention_on(gpu, half) == "flash_attn"
    installed.clear()
    assert attention.attention_on(gpu, half) == "sdpa"
