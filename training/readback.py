"""Verifies a checkpoint: read back from disk, it must compute the same outputs for some rows as the trained module.

The loss only shows that the module in memory is right. Errors in gathering, merging, renaming, tying or writing the
weights only show in the checkpoint itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from contracts.attempt import beat
from contracts.checkpoint_probe import Probe
from modeling.attention import use_packed_attention
from modeling.modules import Trained
from modeling.packing import Packing, pack
from modeling.rows import Response, Row
from training.engines.base import Outputs, TrainingEngine

ROWS = 3
TOKENS = 32
"""Maximum tokens of a prompt, and of a response, so that even a large model takes only seconds on a CPU."""
NAMES = ("logprobs", "scores", "values")
EXACT = 1e-3
"""Maximum difference of fp32 outputs, relative to the largest output: kernels and the order of sums differ."""
NOISE = 3.0
"""Maximum difference of bfloat16 outputs, as a multiple of the model's own rounding noise, which is measured."""


def probe_rows(rows: list[Row]) -> list[Row]:
    """Select a few rows, truncated to TOKENS."""
    return [
        Row(
            row.row_id,
            row.prompt[-TOKENS:],
            tuple(Response(response.ids[:TOKENS]) for response in row.responses[:2]),
        )
        for row in rows[:ROWS]
    ]


def compute_outputs(engine: TrainingEngine, rows: list[Row], packing: Packing) -> Outputs:
    """Compute the trained module's outputs for the rows; every process calls it."""
    return {
        name: value.detach().float().cpu()
        for name, value in engine.forward(pack(rows, packing, engine.device)).items()
        if name in NAMES
    }


@torch.no_grad()
def verify_checkpoint(
    directory: Path,
    expected: Outputs,
    rows: list[Row],
    packing: Packing,
    dtype: torch.dtype,
    read: Callable[[Path], Trained],
) -> dict[str, Any]:
    """Read the checkpoint in `directory` with `read`, in fp32 on the CPU, and compare its outputs with `expected`.

    Returns facts for the manifest.

    Raises:
        RuntimeError: its outputs differ from those of the trained module by more than rounding explains.
    """
    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()  # transformers would shard the model over processes that have exited
    module = read(directory)
    module.eval()
    if packing != "padded":
        use_packed_attention(module.model)
    batch = pack(rows, packing)
    beat()
    exact = module(batch)
    rounded = exact
    if dtype != torch.float32:
        beat()
        rounded = module.to(dtype)(batch)
    differences = {}
    for name, value in expected.items():
        difference = (exact[name].float() - value).abs()
        allowed = EXACT * max(1.0, float(value.abs().max()))
        if dtype == torch.float32:
            found = float(difference.max())
        else:
            found = float(difference.mean())
            allowed += NOISE * float((exact[name].float() - rounded[name].float()).abs().mean())
        if not found <= allowed:
            raise RuntimeError(
                f"the checkpoint, read back, computes other {name} than the trained model: they differ by {found:.3g}, "
                f"of which rounding explains at most {allowed:.3g}. Nothing is published."
            )
        differences[name] = found
    return {"differences": differences, "rows": len(rows), "tokens": int(batch.input_ids.numel())}


def checkpoint_probe(rows: list[Row], outputs: Outputs, dtype: torch.dtype) -> Probe | None:
    """The first row with its log-probabilities under the trained module; None if the module computes none."""
    if "logprobs" not in outputs:
        return None
    prompt, response = rows[0].prompt, rows[0].responses[0].ids
    logprobs = outputs["logprobs"][: len(response)].tolist()
    return Probe(prompt.tolist(), response.tolist(), logprobs, str(dtype).removeprefix("torch."))
