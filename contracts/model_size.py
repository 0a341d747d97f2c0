"""Computes a model's dimensions and parameter count from its config.json. Does not import torch."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Size:
    """The dimensions of a model."""

    parameters: int
    """P, the number of parameters; a tied LM head counts once, with the embedding."""
    hidden: int
    layers: int
    intermediate: int
    """Width of the feed-forward layers that one token passes through."""
    query_width: int
    """Number of attention heads times the width of a head."""
    key_width: int
    """Number of key-value heads times the width of a head."""
    vocabulary: int
    tied: bool
    context: int | None = None
    other_files: int = 64 << 10
    """Bytes of the configuration and tokenizer files."""
    tensors: dict[str, int] = field(default_factory=dict, hash=False)
    """Number of elements of each tensor, by name; empty if no weights were read."""
    model_type: str = "llama"
    """The architecture's `model_type` in config.json."""
    classifier: bool = False
    """Whether it has a head with one score per sequence instead of an LM head."""

    def trained(self, frozen: list[str]) -> int:
        """T, the number of parameters whose names contain none of `frozen`; all parameters if the names are unknown."""
        tensors = {name: count for name, count in self.tensors.items() if not (self.tied and is_head(name))}
        return self.parameters - sum(count for name, count in tensors.items() if any(part in name for part in frozen))

    @property
    def cache_elements(self) -> int:
        """Elements of the KV cache per token: 2 · layers · key-value heads · width of a head."""
        return 2 * self.layers * self.key_width

    def checkpoint_bytes(self, number: int) -> int:
        """Bytes of a published checkpoint (weights, index, tokenizer) with `number` bytes per parameter."""
        return number * self.parameters + 128 * len(self.tensors) + self.other_files

    def as_classifier(self) -> "Size":
        """The same model with one score per sequence instead of an LM head."""
        if self.classifier:
            return self
        head = 0 if self.tied else self.vocabulary * self.hidden
        return replace(self, parameters=self.parameters - head + self.hidden, classifier=True)


def size_from_config(config: dict[str, Any]) -> Size:
    """Compute a model's dimensions from its config.json.

    Parameters are counted as for a Llama: each layer has 2 h·q + 2 h·k (attention, with query width q and key width k),
    3 h·i (feed-forward, times the number of experts) and 2 h (norms); the embedding, the final norm and the LM head
    have 2 V·h + h, or V·h + h if the head is tied.

    Raises:
        KeyError, TypeError, ValueError, ZeroDivisionError: it is not the config of a language model.
    """

    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    hidden, layers = int(first("hidden_size", "n_embd", "d_model")), int(first("num_hidden_layers", "n_layer"))
    heads = int(first("num_attention_heads", "n_head"))
    head_width = int(first("head_dim") or hidden // heads)
    intermediate = int(first("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden)
    experts = int(first("num_local_experts", "num_experts", "n_routed_experts") or 1)
    expert_width = int(first("moe_intermediate_size") or intermediate) if experts > 1 else intermediate
    active = int(first("num_experts_per_tok") or 1) if experts > 1 else 1
    query, key = heads * head_width, int(first("num_key_value_heads") or heads) * head_width
    words = int(config["vocab_size"])
    tied = bool(config.get("tie_word_embeddings", False))
    layer = 2 * hidden * query + 2 * hidden * key + 3 * hidden * expert_width * experts + 2 * hidden
    body = layers * layer + words * hidden + hidden
    return Size(
        parameters=body + (0 if tied else words * hidden),
        hidden=hidden,
        layers=layers,
        intermediate=expert_width * active,
        query_width=query,
        key_width=key,
        vocabulary=words,
        tied=tied,
        context=first("max_position_embeddings", "n_positions"),
        model_type=str(config.get("model_type", "")),
    )


def is_head(name: str) -> bool:
    """Whether a tensor is an LM head."""
    return name == "lm_head.weight" or name.endswith(".lm_head.weight")
