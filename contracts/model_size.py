"""A model's measures, from what its config.json says. No torch."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Size:
    """A model's measures."""

    parameters: int
    """P: a tied LM head, which is the embedding, counts once."""
    hidden: int
    layers: int
    intermediate: int
    """Width of the feed-forward layers that one token passes."""
    query_width: int
    """Attention heads times their width."""
    key_width: int
    """Key-value heads times the width of a head."""
    vocabulary: int
    tied: bool
    context: int | None = None
    other_files: int = 64 << 10
    """Bytes of configuration and tokenizer."""
    tensors: dict[str, int] = field(default_factory=dict, hash=False)
    """Numbers in each tensor by name; empty where there are no weights to look at."""
    model_type: str = "llama"
    """The architecture, as config.json names it."""
    classifier: bool = False
    """Whether it gives one score per sequence instead of having an LM head."""

    def trained(self, frozen: list[str]) -> int:
        """T: the parameters whose names contain none of `frozen`; all where the names are not known."""
        tensors = {name: count for name, count in self.tensors.items() if not (self.tied and is_head(name))}
        return self.parameters - sum(count for name, count in tensors.items() if any(part in name for part in frozen))

    @property
    def cache_numbers(self) -> int:
        """Numbers in the KV cache for each token: 2 · layers · key-value heads · width of a head."""
        return 2 * self.layers * self.key_width

    def checkpoint_bytes(self, number: int) -> int:
        """Bytes of a published checkpoint with numbers of so many bytes: weights, their index, tokenizer."""
        return number * self.parameters + 128 * len(self.tensors) + self.other_files

    def as_classifier(self) -> "Size":
        """The same with one score per sequence instead of an LM head."""
        if self.classifier:
            return self
        head = 0 if self.tied else self.vocabulary * self.hidden
        return replace(self, parameters=self.parameters - head + self.hidden, classifier=True)


def size_by(config: dict[str, Any]) -> Size:
    """The measures by a model's config.json.

    The counts are those of a Llama: each layer has 2 h·q + 2 h·k (attention, of query width q and key width k), 3 h·i
    (feed-forward, times the experts) and 2 h (norms), and embedding, final norm and LM head are 2 V·h + h, or V·h + h
    where the head is tied.

    Raises:
        KeyError, TypeError, ValueError, ZeroDivisionError: it is the config of something else.
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
