"""Loading the model that is trained."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from contracts.errors import UserError
from contracts.models import VALUE_HEAD, ModelInfo
from contracts.seeds import derive_seed
from training.config import TrainingConfig
from training.modes import gathered

Shapes = dict[str, tuple[int, ...]]


def pick_dtype(config: TrainingConfig) -> torch.dtype:
    """The number format that `auto` stands for on this machine."""
    if config.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


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


def load_reward(model: Path, dtype: torch.dtype, seed: int) -> Any:
    """A sequence classifier with one label; on a causal model, with a new head drawn by `seed`.

    The head is normal with standard deviation 1 / sqrt(hidden size + 1) (Stiennon et al. 2020, arXiv 2009.01325).
    """
    loaded = _load(AutoModelForSequenceClassification, model, dtype, num_labels=1)
    if not hasattr(loaded, "score"):
        raise UserError(f"{type(loaded).__name__} has no linear layer `score` as its head; choose another model.")
    if ModelInfo.read(model).labels is None:
        weight = loaded.score.weight
        with gathered([weight], modifier=0), torch.no_grad():
            generator = torch.Generator().manual_seed(derive_seed("reward head", seed))
            fresh = torch.randn(weight.shape, generator=generator) / (weight.shape[-1] + 1) ** 0.5
            weight.copy_(fresh.to(weight))
    return loaded


def _load(auto: Any, model: Path, dtype: torch.dtype, **options: Any) -> Any:
    try:
        return auto.from_pretrained(model, dtype=dtype, use_safetensors=True, **options)
    except (ValueError, OSError) as error:
        raise UserError(f"transformers cannot load {model}: {error}. Check that its files are complete.") from error


def classifier_changes(model: Path, model_config: Any) -> dict[str, Any]:
    """What differs in the config.json of a sequence classifier with one label from that of the model it began as."""
    return {
        "architectures": [AutoModelForSequenceClassification._model_mapping[type(model_config)].__name__],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": padding_token(model, model_config),
    }


def padding_token(model: Path, model_config: Any) -> int:
    """The id that engines pad with; transformers refuses to score a batch by a model without one."""
    if model_config.pad_token_id is not None:
        return int(model_config.pad_token_id)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError(
            f"the tokenizer of {model} has neither a padding nor an EOS token, so nobody could score a batch by "
            "the reward model. Set pad_token in its tokenizer_config.json."
        )
    return int(found)


def set_trainable(model: nn.Module, frozen: list[str]) -> None:
    """Freeze every parameter whose name contains one of `frozen`.

    Raises:
        UserError: one of them names no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in frozen:
        if not any(part in name for name in names):
            raise UserError(f"frozen: no parameter's name contains {part!r}. Names look like {names[0]}, {names[-1]}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"frozen={frozen} freezes every parameter; leave some to train.")
