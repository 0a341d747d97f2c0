"""Worker extension of vLLM: replaces a worker's weights in place, and reads back what its layers compute with.

It runs in the workers, which may be separate processes: vLLM loads this class by name (`EXTENSION` in
generation/vllm_engine.py), and the engine calls its methods in all workers by name.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

COLUMNS = 32
"""Number of columns of each matrix that are read back from its layer."""
MAXIMUM_VALUES = 4096
"""Maximum number of values that are read back of any other parameter."""


class WeightUpdate:
    """Methods that vLLM adds to its worker class."""

    def replace_weights(self, policy: str) -> dict[str, Any]:
        """Reload all weights from a checkpoint directory; returns the result of `read_weights`.

        vLLM maps the files, and copies this worker's shard of each tensor, layer by layer, so no worker holds more than
        its own shard. All weights are first set to NaN, so that no old one remains unnoticed.
        """
        worker: Any = self
        model = worker.get_model()
        _poison(model)
        worker.reload_weights(weights_path=policy)
        _repack_heads(model)
        return self.read_weights()

    def read_weights(self) -> dict[str, Any]:
        """Read back what the layers compute with.

        Returns `lost`: names of layers and parameters with values that are not finite; and `digest`: SHA-256 of the
        values, equal for equal shards of equal weights, whether loaded or updated.
        """
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
    """Set every weight to NaN, and make layers with packed copies of their weights return NaN."""
    for weight in model.parameters():
        if weight.dtype.is_floating_point:
            weight.data.fill_(math.nan)
    for layer in model.modules():  # on a CPU a layer's only weights are a packed copy inside this function
        if hasattr(layer, "cpu_linear"):
            layer.cpu_linear = _without_weights


def _without_weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Stands in for a layer's function until new weights are loaded."""
    return torch.full_like(x, math.nan)


def _repack_heads(model: Any) -> None:
    """Make embeddings and output matrices rebuild the packed weights of their kernels.

    On a CPU vLLM computes logits from a packed copy of the output matrix. If that is tied to the embedding, no weight
    of its own is reloaded, and the copy would remain that of the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            layer.quant_method.process_weights_after_loading(layer)


def _read_back(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield columns of each matrix, as its layer computes them, and values of every other parameter.

    For a unit vector a layer returns exactly a column of its matrix, with NaN in every row that contains a NaN.
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
            yield name, _some_columns(layer, width)
        for own, weight in layer.named_parameters(recurse=False):
            if weight.dtype.is_floating_point and weight.numel():
                yield f"{name}.{own}", _some_values(weight.data)


def _some_columns(layer: Any, width: int) -> Tensor:
    """Some columns of a layer's matrix, [COLUMNS, outputs]."""
    weight = next(layer.parameters())
    places = torch.arange(COLUMNS, device=weight.device) * width // COLUMNS
    vectors = torch.zeros(COLUMNS, width, dtype=layer.params_dtype, device=weight.device)
    vectors[torch.arange(COLUMNS, device=weight.device), places] = 1
    with torch.inference_mode():
        answers: Tensor = layer.quant_method.apply(layer, vectors, None)
    return answers


def _some_values(weight: Tensor) -> Tensor:
    """At most MAXIMUM_VALUES values of a parameter; a single NaN if any of its values is not finite."""
    if not bool(weight.isfinite().all()):
        return torch.full((1,), math.nan)
    flat = weight.reshape(-1)
    return flat[:: -(-flat.numel() // MAXIMUM_VALUES)].float()
