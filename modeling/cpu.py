"""A faster decoder for inference on CPUs; it computes the same as transformers' modules.

oneDNN multiplies by weights in a layout that is prepared once, and fuses the activation, product or sum that follows.
The weights of norms are folded into the matrices that follow them. A rotary embedding is one complex product in place;
for that, the two numbers that it rotates together are adjacent in memory. The last layer is computed only for the
tokens whose states are read.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modeling.attention import AttentionVariant, attend_once, attend_once_last_token
from modeling.heads import backbone_of
from modeling.packing import Packed

LAYERS = {f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}
"""The transformers layer classes supported here: pre-norm attention followed by a pre-norm gated MLP."""
SILU = ("silu", "swish")
MATRICES = [
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


class _Matrix(NamedTuple):
    """A linear layer whose weights are in oneDNN's layout."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, inputs: Tensor, activation: str = "none") -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, activation, [], "")
        return output

    def combined(self, inputs: Tensor, other: Tensor, operation: str) -> Tensor:
        """The layer's output plus `other` ("add") or times `other` ("mul")."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, other, self.weight, self.bias, operation)
        return output


class _Layer(NamedTuple):
    inputs: _Matrix
    """The projections to queries, keys and values, with H, K and K heads, as one matrix."""
    outputs: _Matrix
    gate: _Matrix
    up: _Matrix
    down: _Matrix
    head_weights: Tensor | None
    """[H + K, head size]: the weights of the norms of queries and keys, as in Qwen 3."""
    epsilons: tuple[float, float, float]
    """The epsilons of three norms: before attention, before the MLP, and of queries and keys."""
    scaling: float
    window: int | None


def has_fast_cpu_decoder(model: Any) -> bool:
    """Whether `CpuDecoder` supports this model and is faster than its own modules."""
    if model.device.type != "cpu" or model.dtype != torch.float32 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    backbone = backbone_of(model)
    layers: Any = getattr(backbone, "layers", ())
    if not len(layers) or {type(layer).__name__ for layer in layers} - LAYERS:
        return False
    if backbone.config.hidden_act not in SILU:
        return False
    matrices = [layer.get_submodule(name) for layer in layers for name in MATRICES]
    if any(type(matrix) is not nn.Linear for matrix in matrices):  # quantised, or with an adapter
        return False
    cos, _ = backbone.rotary_emb(torch.empty(1), torch.zeros(1, 1, dtype=torch.long))
    return bool(cos.shape[-1] == layers[0].self_attn.head_dim)  # no partial rotary embedding


class CpuDecoder:
    """A model's decoder layers with their weights rearranged for oneDNN. The layers are removed from the model."""

    def __init__(self, model: Any) -> None:
        backbone = backbone_of(model)
        self._embed, self._rotate, self._norm = backbone.embed_tokens, backbone.rotary_emb, backbone.norm
        attention = backbone.layers[0].self_attn
        self._head_size = int(attention.head_dim)
        self._queries, self._keys = (
            each.out_features // self._head_size for each in (attention.q_proj, attention.k_proj)
        )
        self._layers: list[_Layer] = []
        with torch.inference_mode():
            for index, layer in enumerate(backbone.layers):
                self._layers.append(self._convert(layer))
                backbone.layers[index] = nn.Identity()  # frees its weights
        backbone.layers = nn.ModuleList()

    def __call__(self, batch: Packed, *, only_last: bool) -> Tensor:
        """The last hidden states of a batch with `spans`: [T, hidden size] of every token, or with `only_last`
        [S, hidden size] of the last token of each sequence."""
        plan = batch.plan
        assert plan is not None
        states = self._embed(batch.input_ids[0])
        cos, sin = self._rotate(states[None], batch.position_ids)
        half = self._head_size // 2
        turns = torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())[:, None]
        for index, layer in enumerate(self._layers):
            last = only_last and index == len(self._layers) - 1
            variant = AttentionVariant(
                layer.scaling, layer.window if (layer.window or 0) < plan.longest else None, None, None
            )
            query, key, value = self._heads(layer, states, turns)
            if last:
                attended = attend_once_last_token(query[batch.last], key, value, variant, plan)
                states = states[batch.last]
            else:
                attended = attend_once(query, key, value, variant, plan)
            states = layer.outputs.combined(attended.flatten(1), states, "add")
            normed = _normed(states, layer.epsilons[1])
            states = layer.down.combined(layer.up.combined(normed, layer.gate(normed, "swish"), "mul"), states, "add")
        normed_states: Tensor = self._norm(states)
        return normed_states

    def _heads(self, layer: _Layer, states: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [T, heads, head size] each."""
        heads = layer.inputs(_normed(states, layer.epsilons[0])).unflatten(1, (-1, self._head_size))
        both = self._queries + self._keys
        queries_and_keys, value = heads[:, :both], heads[:, both:]
        if layer.head_weights is not None:
            queries_and_keys.mul_(_scale(queries_and_keys, layer.epsilons[2])).mul_(layer.head_weights)
        torch.view_as_complex(queries_and_keys.unflatten(2, (-1, 2))).mul_(turns)
        return heads[:, : self._queries], heads[:, self._queries : both], value

    def _convert(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        before = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights = [*(self._interleave_halves(each.weight) for each in before[:2]), before[2].weight]
        bias = None
        if before[0].bias is not None:
            bias = torch.cat([*(self._interleave_halves(each.bias) for each in before[:2]), before[2].bias])
        head_weights, head_epsilon = None, 0.0
        if hasattr(attention, "q_norm"):
            counted = ((attention.q_norm, self._queries), (attention.k_norm, self._keys))
            head_weights = torch.cat(
                [self._interleave_halves(norm.weight)[None].expand(heads, -1) for norm, heads in counted]
            )
            head_epsilon = float(attention.q_norm.variance_epsilon)
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        window = getattr(attention, "sliding_window", None)
        if "Mistral" in type(layer).__name__:
            window = getattr(attention.config, "sliding_window", None)
        return _Layer(
            _matrix(torch.cat(weights) * first.weight, bias),
            _matrix(attention.o_proj.weight, attention.o_proj.bias),
            _matrix(mlp.gate_proj.weight * second.weight, mlp.gate_proj.bias),
            _matrix(mlp.up_proj.weight * second.weight, mlp.up_proj.bias),
            _matrix(mlp.down_proj.weight, mlp.down_proj.bias),
            head_weights,
            (float(first.variance_epsilon), float(second.variance_epsilon), head_epsilon),
            float(attention.scaling),
            window,
        )

    def _interleave_halves(self, rows: Tensor) -> Tensor:
        """Reorder each head's rows so that i and i + half, which are rotated together, are adjacent."""
        return rows.view(-1, 2, self._head_size // 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)


def _matrix(weight: Tensor, bias: Tensor | None) -> _Matrix:
    return _Matrix(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias)


def _normed(states: Tensor, epsilon: float) -> Tensor:
    """RMSNorm without weights (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return states * _scale(states, epsilon)


def _scale(states: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x^2) + epsilon) over the last dimension, which is kept."""
    norms: Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return norms.square_().mul_(1 / states.shape[-1]).add_(epsilon).rsqrt_()
