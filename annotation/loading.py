"""How annotation loads models and tokenizers: one device policy, one dtype policy."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from annotation.config import ScoreConfig
from contracts.errors import UserError
from contracts.precision import resolve_dtype

transformers.utils.logging.disable_progress_bar()


def accelerators() -> int:
    """Devices that this process can see beside the CPU."""
    return int(torch.cuda.device_count())


def load_model(config: ScoreConfig, load: Callable[[Path, torch.dtype], Any]) -> Any:
    """The model in eval mode on this process's device.

    dtype auto is bfloat16 on a GPU and float32 on a CPU. Under a launcher, LOCAL_RANK picks the device. The number of
    threads is torch's own reading of OMP_NUM_THREADS. Attention is transformers' default: sdpa where the architecture
    has it (Gemma 2 does not).

    Raises:
        UserError: the checkpoint lacks weights that the model needs, which would be drawn at random.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if accelerators() else torch.device("cpu")
    name = resolve_dtype(config.dtype, on_gpu=accelerators() > 0)
    assert config.model is not None
    model = load(config.model, getattr(torch, name))
    return model.to(device).eval()


def compute_facts(model: Any) -> dict[str, str]:
    """For the manifest: number format and kind of device."""
    return {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}


def pad_right(sequences: list[list[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Sequences as `(input_ids [B, T], attention_mask [B, T])`, padded at the right."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def require_vocabulary(model: Any, sequences: list[list[int]], path: Path | None) -> None:
    """Raise UserError when a token id lies outside the model's embedding table."""
    size = model.get_input_embeddings().num_embeddings
    highest = max(map(max, sequences))
    if highest >= size:
        raise UserError(
            f"token id {highest} does not exist in {path}, whose vocabulary has {size} entries: the rollouts were made "
            "with another tokenizer. Score them with a model that shares the policy's tokenizer."
        )
