"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685) by peft; they are merged into the published weights.

W' = W + (alpha / rank) B A          A [rank, in], B [out, rank]; B starts as zero
"""

from typing import Any

import torch
from torch import Tensor

from contracts.errors import UserError
from contracts.seeds import derive_seed
from training.config import LoraSection

ADAPTER = "default"
HEAD = "score."
"""Name prefix of a classifier's head, which is new and trained in full."""


def add_adapters(model: Any, section: LoraSection, seed: int) -> frozenset[str]:
    """Insert adapters into a transformers model; only they (in fp32) and a classifier's head are trained.

    Returns the names of the adapted layers whose weights are [in, out] instead of [out, in], such as GPT-2's Conv1D;
    the shape of square weights does not show it.

    Raises:
        UserError: the targets match no layer that can be adapted, or the LM head.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules="all-linear" if section.targets == ["all-linear"] else section.targets,
        lora_dropout=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed("lora", seed))
        try:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(f"lora.targets={section.targets} cannot be adapted: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(HEAD))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if hasattr(head, "base_layer") and not hasattr(model, HEAD.rstrip(".")):
        raise UserError(f"lora.targets={section.targets} includes the LM head, which cannot be adapted. Leave it out.")
    if hasattr(embedding, "base_layer") and head is not None and model.config.get_text_config().tie_word_embeddings:
        raise UserError(
            f"lora.targets={section.targets} includes the embedding, which is also the LM head of this model "
            "(tie_word_embeddings), and an adapter would change only one of them. Leave it out."
        )
    return frozenset(name for name, layer in model.named_modules() if getattr(layer, "fan_in_fan_out", False))


def merge_adapters(
    weights: dict[str, Tensor], section: LoraSection, transposed: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Merge the adapters into the weights that they adapt, in fp32; returns the weights by the original model's names.

    Args:
        weights: weights by the names of the model with adapters.
        section: the section that `add_adapters` was called with.
        transposed: the result of `add_adapters`.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain != name and name.endswith(".weight"):
            layer = name.removesuffix(".base_layer.weight")
            if f"{layer}.lora_embedding_A.{ADAPTER}" in weights:  # [rank, tokens] and [size, rank]
                names = [f"{layer}.lora_embedding_{side}.{ADAPTER}" for side in "AB"]
                turned = True
            else:
                names = [f"{layer}.lora_{side}.{ADAPTER}.weight" for side in "AB"]
                turned = layer in transposed
            down, up = (weights[each].float() for each in names)
            delta = up @ down
            tensor = tensor.float() + section.alpha / section.rank * (delta.T if turned else delta).to(tensor.device)
        merged[plain] = tensor
    return merged
