"""A model directory that transformers 4 and 5 and vLLM all load."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LLAMA_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` as readable JSON in a fixed order."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(path: Path, model: torch.nn.Module) -> None:
    """Write all weights to one safetensors file, a tied `lm_head.weight` included.

    Without it, an engine that reloads weights keeps its old head. Tied tensors are copied, because safetensors
    stores no aliases.
    """
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in state
    save_file(state, path, metadata={"format": "pt"})


def write_llama_config(path: Path, config: Any) -> None:
    """Write a `LlamaConfig` in a form that transformers 4 and 5 read alike.

    `rope_theta` and `torch_dtype` go to the top level, where version 4 looks for them: from a file of version 5 it
    takes its own default rope_theta, silently.
    """
    full = config.to_dict()
    rope_theta = full["rope_parameters"]["rope_theta"]
    write_json(
        path,
        {
            "architectures": ["LlamaForCausalLM"],
            **{key: full[key] for key in LLAMA_KEYS},
            "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
            "rope_theta": rope_theta,
            "torch_dtype": "float32",
        },
    )
