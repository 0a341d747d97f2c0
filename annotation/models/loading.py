"""Loads models for scoring: chooses device and dtype, and keeps a loaded scorer for the next stage of the process."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from annotation.samples import Scorer
from annotation.scorers.base import ModelSettings, Opening
from contracts.artifacts import input_digest, model_fingerprint
from contracts.declaration import load
from contracts.errors import UserError
from contracts.fingerprint import digest
from contracts.precision import resolve_dtype
from contracts.resident import hold
from modeling.rows import Row

transformers.utils.logging.disable_progress_bar()


def accelerators() -> int:
    """Number of accelerators that are visible to this process."""
    return int(torch.cuda.device_count())


def load_model(config: ModelSettings, load: Callable[[Path, torch.dtype], Any]) -> Any:
    """The model in eval mode on this process's device.

    dtype auto is bfloat16 on a GPU and float32 on a CPU. Under a launcher, LOCAL_RANK picks the device. The number of
    threads is torch's own reading of OMP_NUM_THREADS. Attention is transformers' default: sdpa where the architecture
    has it (Gemma 2 does not).

    Raises:
        UserError: the checkpoint lacks weights of the model, which would be initialized at random.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if accelerators() else torch.device("cpu")
    name = resolve_dtype(config.dtype, on_gpu=accelerators() > 0)
    assert config.model is not None
    model = load(config.model, getattr(torch, name))
    return model.to(device).eval()


def open_model(config: ModelSettings, opening: Opening) -> Scorer:
    """A scorer with its model loaded; a model that the previous stage of this process loaded is reused."""
    longest = config.longest
    fields = config.model_dump(mode="json", exclude={"output", "rollouts", "pairs", "model", "against"})
    inputs = {"model": str(config.model), "weights": model_fingerprint(config.model) if config.model else None}
    if (against := getattr(config, "against", None)) is not None:
        inputs["against"] = input_digest(against)
    scorer: Scorer
    scorer, start = hold(
        "scorer",
        fixed=digest([fields, longest]),
        content=digest(inputs),
        open_=lambda: load(config.reader)(config, longest),
    )
    scorer.facts["start"] = start
    return scorer


def compute_facts(model: Any) -> dict[str, str]:
    """Facts for the manifest: dtype and device type."""
    return {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}


def pad_right(sequences: list[list[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Pad sequences on the right: `(input_ids [B, T], attention_mask [B, T])`."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def require_vocabulary(model: Any, rows: Sequence[Row], path: Path | None) -> None:
    """Raise UserError when a token id lies outside the model's embedding table."""
    size = model.get_input_embeddings().num_embeddings
    highest = max(
        (int(ids.max(initial=0)) for row in rows for ids in (row.prompt, *(answer.ids for answer in row.responses))),
        default=0,
    )
    if highest >= size:
        raise UserError(
            f"token id {highest} does not exist in {path}, whose vocabulary has {size} entries: the rollouts were made "
            "with another tokenizer. Score them with a model that shares the policy's tokenizer."
        )
