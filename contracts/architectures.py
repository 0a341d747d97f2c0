"""Decides from config.json whether a causal language model is supported, and how its batches are packed.

A test builds a tiny model of every architecture in this table and compares engine, annotation and trainer with the
model's own forward pass. An architecture that is not in the table is measured when it is loaded (`modeling/probe.py`).
"""

from collections.abc import Mapping
from typing import Any, Literal

from contracts.errors import UserError

FLAT = frozenset(
    "afmoe apertus arcee cohere cohere2 cwm dbrx deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 "
    "flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox "
    "gpt_oss granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax jais2 jetmoe "
    "llama minicpm3 minimax_m2 ministral ministral3 mistral mixtral nanochat olmo olmo2 olmo3 olmoe opt persimmon phi "
    "phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2 vaultgemma".split()
)
"""Model types that run with Ratchet's attention: batches without padding, in which a shared prompt is computed once."""
PADDED = frozenset(
    "bloom codegen doge falcon gpt_neo gpt_neox_japanese gptj llama4_text mpt nemotron phimoe stablelm xglm".split()
)
"""Model types that run with their own attention: one sequence per row, padded on the right."""
RECURRENT = frozenset(
    "bamba falcon_h1 falcon_mamba granitemoehybrid jamba lfm2 mamba mamba2 minimax olmo_hybrid qwen3_5_moe_text "
    "qwen3_5_text qwen3_next recurrent_gemma".split()
)
"""Model types with layers that carry a state from token to token; of the engines, only vLLM can sample from them."""
CONDITIONAL = frozenset({"gemma3"})
"""Model types with a vision tower that can be trained on text; everything but the language model is frozen."""
ENCODERS = frozenset(
    "albert bert bert-generation big_bird camembert data2vec-text deberta deberta-v2 distilbert electra ernie "
    "megatron-bert mobilebert modernbert mpnet reformer rembert roberta roberta-prelayernorm roc_bert roformer xlm "
    "xlm-roberta xlm-roberta-xl xlnet xmod".split()
)
"""Model types with bidirectional attention, or that were designed for it."""
REFUSED = {
    "modernbert-decoder": "puts layers of its own between its last hidden states and its logits",
    "openai-gpt": "keeps no cache, so no engine can sample from it",
    "rwkv": "carries a state from token to token that padding changes, and no engine samples from it right",
}
"""Model types that some stage would compute incorrectly, with the reason as it appears in the message."""
OWN_ATTENTION = ("full_attention", "sliding_attention")
"""Layer types that flat batches support; models of a flat type with other layers (convolutions, chunks) are padded."""

Support = Literal["flat", "padded", "recurrent", "measured"]


def text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    found = config.get("text_config")
    return found if isinstance(found, Mapping) else config


def support_of(config: Mapping[str, Any]) -> Support:
    """How a causal language model is computed; `measured` if the architecture is unknown.

    Raises:
        UserError: it is known not to be supported.
    """
    require_supported(config)
    text = text_settings(config)
    model_type = str(text.get("model_type") or _text_type(config))
    if model_type in RECURRENT:
        return "recurrent"
    if model_type in FLAT:
        own = all(layer in OWN_ATTENTION for layer in text.get("layer_types") or ())
        return "flat" if own else "padded"
    return "padded" if model_type in PADDED else "measured"


def require_supported(config: Mapping[str, Any], what: str = "the model") -> None:
    """Raise UserError if a model is known not to work for sampling, scoring and training.

    Args:
        config: its config.json.
        what: the model's name for the message.
    """
    model_type = str(config.get("model_type", ""))
    text = str(text_settings(config).get("model_type") or model_type)
    architecture = str((config.get("architectures") or ["unknown"])[0])
    if config.get("is_encoder_decoder", "decoder_layers" in config or "num_decoder_layers" in config):
        reason = "is an encoder-decoder, which answers a prompt that it has encoded instead of continuing a text"
    elif model_type in ENCODERS:
        reason = "is an encoder: its layers were made to see the tokens that follow, too"
    elif model_type in REFUSED or text in REFUSED:
        reason = REFUSED.get(model_type) or REFUSED[text]
    elif architecture.endswith("ForConditionalGeneration") and model_type not in CONDITIONAL:
        reason = "has inputs other than text, and its language model cannot be trained separately"
    else:
        return
    raise UserError(
        f"{what} ({architecture}, model_type {model_type or 'unknown'}) {reason}. Choose a causal language model; "
        "docs/models.md lists them."
    )


def context_switch(config: Mapping[str, Any]) -> int | None:
    """The length beyond which a model with longrope uses its long factors; None if its context is not longer than that.

    Every stage uses the long factors of such a model for all sequences (`modeling/rope.py`).
    """
    text = text_settings(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) not in ("longrope", "su"):
        return None
    original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
    longest = text.get("max_position_embeddings")
    return int(original) if original and longest and longest > original else None


def _text_type(config: Mapping[str, Any]) -> str:
    model_type = str(config.get("model_type", ""))
    return f"{model_type}_text" if model_type in CONDITIONAL and f"{model_type}_text" in FLAT else model_type
