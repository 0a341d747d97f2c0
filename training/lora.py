"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685) by peft, merged into the weights for the hand-off.

W' = W + (alpha / rank) B A          A [rank, in], B [out, rank]; B begins as zero
"""

from typing import Any

import torch
from torch import Tensor

from contracts.errors import UserError
from contracts.seeds import derive_seed
from training.config import LoraSection

ADAPTER = "default"
HEAD = "score."
"""Beginning of the names of a classifier's own parameters, which are new and trained whole."""


def add_adapters(model: Any, section: LoraSection, seed: int) -> None:
    """Put adapters into a transformers model; they (fp32) and a classifier's head are all that is trained.

    Raises:
        UserError: the targets name no layer that can be adapted.
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


def merge_adapters(weights: dict[str, Tensor], section: LoraSection) -> dict[str, Tensor]:
    """Weights with the names of the model without adapters, which are added to what they adapt."""
    merged: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain != name and name.endswith(".weight"):
            layer = name.removesuffix(".base_layer.weight")
            down, up = (weights[f"{layer}.lora_{side}.{ADAPTER}.weight"].float() for side in "AB")
            tensor = (tensor.float() + section.alpha / section.rank * (up @ down)).to(tensor.dtype)
        merged[plain] = tensor
    return merged
