"""Converts SmolLM2-135M-Instruct from a GGUF file to a model directory.

The file comes from a package registry (scripts/get-smollm2.sh), so that a real chat model is available without a model
hub. Its 4-bit weights are dequantized and stored as bfloat16.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from contracts.errors import UserError
from contracts.stage import Context, Outcome
from embedded.checkpoint import commit_model
from embedded.config import Smollm2Config


def run(config: Smollm2Config, context: Context) -> Outcome:
    """Convert the file and publish the model."""
    if config.source.read_bytes()[:4] != b"GGUF":
        raise UserError(f"{config.source} is not a GGUF file. Get it by `bash scripts/get-smollm2.sh`.")
    source_file: dict[str, Any] = {"gguf_file": config.source.name}
    with context.timed("load"):
        tokenizer = AutoTokenizer.from_pretrained(str(config.source.parent), **source_file)
        model = AutoModelForCausalLM.from_pretrained(str(config.source.parent), dtype=torch.float32, **source_file)
    if not isinstance(model.config, LlamaConfig) or not tokenizer.chat_template:
        raise UserError(
            f"{config.source} holds a {type(model).__name__}; expected SmolLM2, a Llama with chat template."
        )
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    model.config.update({f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in special.items()})
    with context.timed("save"):
        commit_model(
            context.publication,
            "",
            state=state,
            config=model.config,
            tokenizer=tokenizer.backend_tokenizer,
            special=special,
            chat_template=tokenizer.chat_template,
        )
    return Outcome(unit="rows", facts={"parameters": model.num_parameters()})
