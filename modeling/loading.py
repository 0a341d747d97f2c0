"""Loading models: one way for whoever needs their weights, and nothing drawn at random that should have been read."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from contracts.errors import UserError
from contracts.models import VALUE_HEAD, ModelInfo
from contracts.seeds import derive_seed
from modeling.modes import gathered

Shapes = dict[str, tuple[int, ...]]


def read_config(model: Path) -> Any:
    """The transformers configuration of a model directory.

    Raises:
        UserError: transformers cannot read it.
    """
    try:
        return AutoConfig.from_pretrained(model)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"transformers cannot read the configuration of {model}: {error}. Check its config.json."
        ) from error


def vocabulary_size(config: Any) -> int:
    """Number of token ids that the embedding knows."""
    return int(config.get_text_config().vocab_size)


def tensor_shapes(auto: Any, config: Any) -> Shapes:
    """Name and shape of every tensor of the architecture, found without allocating weights.

    Call it before an `Accelerator` exists: under ZeRO-3 every later construction partitions its parameters.
    """
    with torch.device("meta"):
        model = auto.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def load_value_head(model: Path, hidden_size: int) -> torch.Tensor:
    """The value head of a policy that is its own critic, [1, hidden size]; zeros where it has none yet."""
    if not (model / VALUE_HEAD).is_file():
        return torch.zeros(1, hidden_size)
    return load_file(model / VALUE_HEAD)["weight"]


def load_causal(model: Path, dtype: torch.dtype) -> Any:
    """A causal language model with its weights."""
    return _load(AutoModelForCausalLM, model, dtype)


def load_classifier(model: Path, dtype: torch.dtype) -> Any:
    """A sequence classifier with its weights, head included."""
    return _load(AutoModelForSequenceClassification, model, dtype)


def load_reward(model: Path, dtype: torch.dtype, seed: int) -> Any:
    """A sequence classifier with one label; on a causal model, with a new head drawn by `seed`.

    The head is normal with standard deviation 1 / sqrt(hidden size + 1) (Stiennon et al. 2020, arXiv 2009.01325).
    """
    has_head = ModelInfo.read(model).labels is not None
    loaded = _load(AutoModelForSequenceClassification, model, dtype, new_head=not has_head, num_labels=1)
    if not hasattr(loaded, "score"):
        raise UserError(f"{type(loaded).__name__} has no linear layer `score` as its head; choose another model.")
    if not has_head:
        weight = loaded.score.weight
        with gathered([weight], modifier=0), torch.no_grad():
            generator = torch.Generator().manual_seed(derive_seed("reward head", seed))
            fresh = torch.randn(weight.shape, generator=generator) / (weight.shape[-1] + 1) ** 0.5
            weight.copy_(fresh.to(weight))
    return loaded


def _load(auto: Any, model: Path, dtype: torch.dtype, *, new_head: bool = False, **options: Any) -> Any:
    """A model whose every tensor was read from the checkpoint; with `new_head` all but a classifier's head.

    Raises:
        UserError: transformers cannot load it, or it lacks weights that would be drawn at random.
    """
    try:
        loaded, report = auto.from_pretrained(
            model, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (ValueError, OSError) as error:
        raise UserError(f"transformers cannot load {model}: {error}. Check that its files are complete.") from error
    missing = sorted(name for name in report["missing_keys"] if not (new_head and name == "score.weight"))
    if missing:
        raise UserError(
            f"{model} lacks the weights {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}, which would "
            "be random numbers. Save the whole model with save_pretrained."
        )
    return loaded
