"""Tiny random models of many architectures with their special features enabled: windows, caps, experts, ALiBi."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 48
CONTEXT = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0,
    # The same under other names.
    "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "n_inner": 48, "d_model": 32, "n_layers": 3,
    "n_heads": 4, "ffn_dim": 48, "num_layers": 3, "num_heads": 4, "word_embed_proj_dim": 16, "max_seq_len": CONTEXT,
    # Windows, caps and scales, which would have no effect at their default values.
    "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0, "attention_chunk_size": 8,
    "attention_window_size": 8, "logit_scale": 0.5, "logits_scaling": 4.0,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "moe_k": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1,
    "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    # Recurrent and linear layers.
    "state_size": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "intermediate_size": 48, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba": {"intermediate_size": 64, "time_step_rank": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "minicpm3": {**LATENT, "dim_model_base": 16},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention", "recurrent"]},
    "rwkv": {"attention_hidden_size": 32},
}  # fmt: skip
"""Additional settings of single architectures."""
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config with three layers, which include every kind of layer of the architecture."""
    kind = type(AutoConfig.for_model(model_type))
    default = kind()
    text = default.get_text_config()
    sizes = {name: value for name, value in SIZES.items() if _is_settable(text, name)}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(text, name, None)
        if kinds and _is_settable(text, name):
            sizes[name] = (list(dict.fromkeys(kinds)) * 3)[:3]
    sizes |= OWN.get(model_type, {}) | changes
    if text is default:
        return kind(**sizes)
    return kind(text_config=sizes, vision_config=VISION, mm_tokens_per_image=4, image_token_index=45,
                boi_token_index=46, eoi_token_index=47)  # fmt: skip


def tiny_model(config: Any) -> Any:
    """A random model in evaluation mode. No weight keeps a trivial initial value, so that each has an effect."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _is_settable(config: Any, name: str) -> bool:
    target = config.attribute_map.get(name, name)
    own = getattr(type(config), target, None)
    if isinstance(own, property) and own.fset is None:
        return False
    return target in vars(config) or isinstance(own, property)
