"""Prepares the initial model of a training: dtype, config.json, trainable parameters."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from contracts.errors import UserError
from contracts.precision import resolve_dtype
from contracts.tokenizer import load_tokenizer
from training.config import TrainingConfig


def pick_dtype(config: TrainingConfig) -> torch.dtype:
    """The training's dtype; `auto` is resolved for this machine."""
    name = resolve_dtype(config.dtype, on_gpu=torch.cuda.is_available())
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def classifier_changes(model: Path, model_config: Any) -> dict[str, Any]:
    """The changes to config.json that turn a causal model into a sequence classifier with one label."""
    return {
        "architectures": [AutoModelForSequenceClassification._model_mapping[type(model_config)].__name__],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": padding_token(model, model_config),
    }


def padding_token(model: Path, model_config: Any) -> int:
    """The padding token id, or else EOS; transformers' classifiers refuse batches without a padding token."""
    if model_config.pad_token_id is not None:
        return int(model_config.pad_token_id)
    tokenizer = load_tokenizer(model)
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError(
            f"the tokenizer of {model} has neither a padding nor an EOS token, which a classifier needs for batches. "
            "Set pad_token in its tokenizer_config.json."
        )
    return int(found)


def set_trainable(model: Any, frozen: list[str]) -> None:
    """Freeze parameters whose name contains one of `frozen`, and those outside of the language model and its head.

    Raises:
        UserError: one of them matches no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in frozen:
        if not any(part in name for name in names):
            raise UserError(f"frozen: no parameter's name contains {part!r}. Names look like {names[0]}, {names[-1]}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    for parameter in non_text_parameters(model):
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"frozen={frozen} freezes every parameter; leave some to train.")


def non_text_parameters(model: Any) -> list[nn.Parameter]:
    """Parameters that text does not use, such as those of a vision tower."""
    if model.config.get_text_config() is model.config:
        return []
    parts = [model.get_decoder(), model.get_output_embeddings(), getattr(model, "score", None)]
    language = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in language]
