"""Writes model directories without weights, and prompts of a given length: the inputs of simulations."""

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
           "intermediate_size": 11008, "vocab_size": 32000},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 14336, "vocab_size": 128256},
    "13B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
            "intermediate_size": 13824, "vocab_size": 32000},
    "34B": {"hidden_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 8,
            "intermediate_size": 22016, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "intermediate_size": 28672, "vocab_size": 32000},
}  # fmt: skip
"""From the config.json of Llama 2 (7B, 13B, 70B), Code Llama (34B) and Llama 3 (8B)."""


def write_model(folder: Path, name: str) -> Path:
    """Write the directory of a Llama of this shape, without weights."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    further: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    further |= {"max_position_embeddings": 8192, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps({**further, **SHAPES[name]}))
    return path


def write_prompts(path: Path, count: int, tokens: int) -> Path:
    """Write `count` prompts of about `tokens` tokens, at four bytes per token."""
    rows = (json.dumps({"prompt": f"{number} ".ljust(4 * tokens, "x")}) for number in range(count))
    path.write_text("\n".join(rows) + "\n")
    return path
