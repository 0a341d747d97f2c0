"""Writes checkpoints of random bytes without any library."""

import json
import random
from pathlib import Path
from typing import Any

WIDTHS = {"F32": 4, "BF16": 2, "I16": 2, "U8": 1}


def config_of(**changes: Any) -> dict[str, Any]:
    """The config.json of a tiny Llama."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "vocab_size": 70,
        "tie_word_embeddings": True, **changes,
    }  # fmt: skip


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a Llama's tensors by name."""
    hidden, width, words = config["hidden_size"], config["head_dim"], config["vocab_size"]
    query, key = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    inner = config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj.weight": (query, hidden), "self_attn.k_proj.weight": (key, hidden),
            "self_attn.v_proj.weight": (key, hidden), "self_attn.q_proj.bias": (query,),
            "self_attn.o_proj.weight": (hidden, query), "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden), "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}"] = shape
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (words, hidden)
    return shapes


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], *, dtype: str = "BF16", seed: int = 0, **metadata: str
) -> None:
    """Write tensors of these shapes with random bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    place = 0
    for name, shape in shapes.items():
        size = WIDTHS[dtype]
        for length in shape:
            size *= length
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(place))


def write_checkpoint(path: Path, *, files: int = 1, remainders: bool = False, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint like that of a training: weights in one or several files, optionally with remainders to fp32,
    config and tokenizer."""
    config = config_of(**changes)
    shapes = dict(sorted(shapes_of(config).items()))
    names = list(shapes)
    for number in range(files):
        part = {name: shapes[name] for name in names[number * len(names) // files : (number + 1) * len(names) // files]}
        file = "model.safetensors" if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        write_safetensors(path / file, part, seed=seed + number)
        if remainders:
            write_safetensors(path / "master" / file, part, dtype="I16", seed=100 + number, weights="their hash")
    if files > 1:
        where = {
            name: f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            for number in range(files)
            for name in names[number * len(names) // files : (number + 1) * len(names) // files]
        }
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    (path / "training-log.jsonl").write_text('{"step": 1}\n')
    return path


def contents(path: Path) -> dict[str, bytes]:
    """The contents of all files of a directory."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
