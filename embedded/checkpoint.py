"""Writes a model directory that transformers 4, transformers 5 and vLLM load with the same result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig

from contracts.ledger import Ledger
from contracts.publication import Publication

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


def commit_model(
    publication: Publication,
    folder: str,
    *,
    state: dict[str, torch.Tensor],
    config: LlamaConfig,
    tokenizer: Tokenizer,
    special: dict[str, str],
    chat_template: str,
) -> None:
    """Write and commit a Llama's files.

    Args:
        publication: the publication to add the files to.
        folder: prefix of their names, "" or "model/".
        state: all weights of a `LlamaForCausalLM`, of one dtype, including a tied `lm_head.weight`: without it, an
            engine that reloads weights would keep its old head.
        config: the model's configuration, with the ids of BOS, EOS and padding.
        tokenizer: a tokenizer that adds no special tokens on its own; the chat template has them all.
        special: `bos_token`, `eos_token`, `pad_token` and `unk_token`.
        chat_template: a Jinja template.
    """
    (dtype,) = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    if "lm_head.weight" not in state:
        raise AssertionError("a checkpoint without its LM head")
    # safetensors cannot store aliases, so tied tensors are copied.
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in special.items() if name != "unk_token"}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        **special,
    }

    def commit(name: str, write: Callable[[Path], object]) -> None:
        scratch = publication.scratch(folder + name)
        write(scratch)
        publication.commit(folder + name, Ledger("rows"))

    commit("model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    commit("config.json", lambda path: _write_json(path, llama_config(config, dtype)))
    commit("generation_config.json", lambda path: _write_json(path, {**ids, "eos_token_id": [ids["eos_token_id"]]}))
    commit("tokenizer.json", lambda path: tokenizer.save(str(path)))
    commit("tokenizer_config.json", lambda path: _write_json(path, tokenizer_config))
    commit("chat_template.jinja", lambda path: path.write_text(chat_template, encoding="utf-8"))


def llama_config(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The content of `config.json`, in a form that transformers 4 and 5 read with the same result.

    `rope_theta` and `torch_dtype` are also at the top level, where version 4 looks for them: given a file of version 5,
    it silently uses its own default rope_theta.
    """
    full = config.to_dict()
    rope_theta = full["rope_parameters"]["rope_theta"]
    return {
        "architectures": ["LlamaForCausalLM"],
        **{key: full[key] for key in LLAMA_KEYS},
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_theta": rope_theta,
        "torch_dtype": dtype,
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
