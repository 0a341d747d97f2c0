"""Tests unknown architectures: a sequence's outputs must not depend on the rest of the batch."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from contracts.errors import UserError
from contracts.models import ModelInfo
from modeling.heads import backbone_of, logit_scaling

LENGTHS = (5, 48)
"""Lengths in tokens of the two test sequences."""
LARGEST = 300_000_000
"""Parameters of the largest model that is built only for this test."""
LAYERS = 4
VOCABULARY = 256


@torch.no_grad()
def require_independence(model: Any, name: str) -> None:
    """Check that hidden states depend only on the preceding tokens of their own sequence.

    A short and a long sequence are computed alone and together (padded on the right, as scorers and trainers do), and
    the long one without its second half.

    Args:
        name: the model's name in the message.

    Raises:
        UserError: hidden states depend on something else.
    """
    size = int(model.config.get_text_config().vocab_size)
    short, long = (length_of(model, length) for length in LENGTHS)
    ids = torch.randint(0, size, (2, long), generator=torch.Generator().manual_seed(0)).to(model.device)
    together = _states(model, ids)
    alone = [_states(model, ids[:1, :short])[0], _states(model, ids[1:])[0]]
    compared = {
        "a sequence padded on the right": (together[0, :short], alone[0]),
        "a sequence next to a shorter one": (together[1], alone[1]),
        "the beginning of a sequence": (_states(model, ids[1:, : long // 2])[0], alone[1][: long // 2]),
    }
    tolerance = 1e-3 if together.dtype == torch.float32 else 5e-2
    for what, (found, expected) in compared.items():
        if float((found - expected).abs().max()) > tolerance * float(expected.abs().max()):
            raise UserError(
                f"{name} ({type(model).__name__}) computes {what} differently from that sequence alone, so its "
                "log-probabilities would depend on the batch. Choose a model that docs/models.md lists."
            )


def length_of(model: Any, length: int) -> int:
    """`length`, at most the model's context length."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(length, limit) if isinstance(limit, int) and limit > 0 else length


def _states(model: Any, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    states: Tensor = backbone_of(model)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return states.float() if states.dtype == torch.float64 else states


def check_architecture(path: Path, config: Any) -> str | None:
    """Test an unknown architecture on a small random model, before any weights are read.

    Args:
        path: the model directory.
        config: its transformers configuration.

    Returns:
        None, or the reason why no small model could be tested; the real model is then tested after loading.

    Raises:
        UserError: the architecture fails the test.
    """
    info = ModelInfo.read(path)
    info.require_causal()
    if info.support != "measured":
        return None
    try:
        model = _reduced_model(config)
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, RuntimeError, ImportError) as error:
        return f"no small test model of type {config.model_type} can be built ({type(error).__name__}: {error})"
    if model is None:
        return f"a model of type {config.model_type} with {LAYERS} layers is too large to be built only for a test"
    logit_scaling(model)
    require_independence(model, str(path))
    return None


def _reduced_model(config: Any) -> Any:
    """The architecture with few layers and a small vocabulary; None if that is still too large."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(text, name, list(value[:LAYERS]))
    text.num_hidden_layers = min(layers, LAYERS)
    text.vocab_size = min(int(text.vocab_size), VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    with torch.device("meta"):
        size = sum(tensor.numel() for tensor in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        return None
    with _seeded():
        return AutoModelForCausalLM.from_config(config).eval()


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
