"""New weights in the workers of a vLLM engine, in place, and what their layers then compute with.

Runs in the workers, which may be processes of their own: an engine is told to load this module (`EXTENSION` in
generation/vllm_engine.py), and asks all of them by the names of the methods.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

COLUMNS = 32
"""Of each matrix, read back from the layer that computes with it."""
SAMPLED = 4096
"""Of the numbers of any other parameter."""


class WeightUpdate:
    """What every worker can do besides what vLLM has it do."""

    def take_weights(self, policy: str) -> dict[str, Any]:
        """Reload all weights from a checkpoint directory, and say what `read_weights` says.

        vLLM maps the files, and copies from them what this worker has of each tensor, one layer after the other; so
        no worker holds more than its own part. Everything is first set to NaN, so that nothing old can stay unseen.
        """
        worker: Any = self
        model = worker.get_model()
        _poison(model)
        worker.reload_weights(weights_path=policy)
        _renew_heads(model)
        return self.read_weights()

    def read_weights(self) -> dict[str, Any]:
        """`lost`: names of layers and parameters that are not all numbers. `digest`: SHA-256 of what was read back, the
        same for the same part of the same weights, however they came here."""
        worker: Any = self
        lost: list[str] = []
        found = hashlib.sha256()
        for name, values in _read_back(worker.get_model()):
            if not bool(values.isfinite().all()):
                lost.append(name)
            found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            found.update(values.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
        return {"lost": lost, "digest": found.hexdigest()}


def _poison(model: Any) -> None:
    """Set every weight to NaN, and what is computed with packed copies of them."""
    for weight in model.parameters():
        if weight.dtype.is_floating_point:
            weight.data.fill_(math.nan)
    for layer in model.modules():  # on a CPU layers keep packed copies alone, behind this function
        if hasattr(layer, "cpu_linear"):
            layer.cpu_linear = _without_weights


def _without_weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of a layer that has lost its weights, and was given no others."""
    return torch.full_like(x, math.nan)


def _renew_heads(model: Any) -> None:
    """Have embeddings and output matrices arrange their weights for their kernels once more.

    On a CPU vLLM computes logits from a packed copy of the output matrix. Where that is tied to the embeddings, no
    weight of its own is reloaded, and its copy would stay that of the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            layer.quant_method.process_weights_after_loading(layer)


def _read_back(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Columns of each matrix, as its layer computes them, and numbers of every other parameter.

    A layer answers a unit vector with a column of its matrix, exactly; and with NaN where any number of a row is NaN.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for name, layer in model.named_modules():
        width = None
        if isinstance(layer, LinearBase):
            width = getattr(layer, "input_size_per_partition", layer.input_size)
        elif isinstance(layer, VocabParallelEmbedding):
            width = layer.embedding_dim
        if width is not None:
            yield name, _columns(layer, width)
        for own, weight in layer.named_parameters(recurse=False):
            if weight.dtype.is_floating_point and weight.numel():
                yield f"{name}.{own}", _numbers(weight.data)


def _columns(layer: Any, width: int) -> Tensor:
    """[COLUMNS, outputs]: some columns of a layer's matrix."""
    weight = next(layer.parameters())
    places = torch.arange(COLUMNS, device=weight.device) * width // COLUMNS
    vectors = torch.zeros(COLUMNS, width, dtype=layer.params_dtype, device=weight.device)
    vectors[torch.arange(COLUMNS, device=weight.device), places] = 1
    with torch.inference_mode():
        answers: Tensor = layer.quant_method.apply(layer, vectors, None)
    return answers


def _numbers(weight: Tensor) -> Tensor:
    """Some numbers of a parameter, all of a small one; all NaN where any of it is not finite."""
    if not bool(weight.isfinite().all()):
        return torch.full((1,), math.nan)
    flat = weight.reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLED)].float()
