"""Measures the drift between the trainer's log-probabilities and those that the generation engine reported."""

from typing import Any

import numpy as np
import torch

from modeling.packing import Packing
from modeling.rows import Row
from training.engines.base import TrainingEngine
from training.loop import make_micro_batches

RATIO = (0.9, 1.1)
"""Tokens with an importance ratio outside of this range are counted."""


def measure_drift(rows: list[Row], engine: TrainingEngine, packing: Packing, budget: int) -> dict[str, Any]:
    """Compute every response's `proximal` log-probabilities with the engine, and compare them with `behaviour`.

    Returns:
        mean: the mean of |log p_trainer - log p_engine| over all tokens (nats); p95: its 95th percentile; outside: the
        share of tokens whose ratio p_trainer / p_engine is outside of `RATIO`; tokens: the number of tokens.
    """
    responses = [response for row in rows for response in row.responses]
    starts = np.cumsum([0, *(len(response.ids) for response in responses)])
    first = {id(response): start for response, start in zip(responses, starts[:-1], strict=True)}
    found = torch.zeros(int(starts[-1]))
    for micro_batch in make_micro_batches(rows, engine=engine, budget=budget, packing=packing):
        logprobs = engine.forward(micro_batch.batch)["logprobs"].float().cpu() * micro_batch.weight
        owners = [response for row in micro_batch.rows for response in row.responses]
        for response, values in zip(owners, logprobs.split(micro_batch.batch.lengths.tolist()), strict=True):
            found[first[id(response)] :][: len(values)] += values
    whole = engine.all_reduce(found).numpy()
    for response, values in zip(responses, np.split(whole, starts[1:-1]), strict=True):
        response.tokens["proximal"] = values
    difference = whole - np.concatenate([response.tokens["behaviour"] for response in responses])
    ratio = np.exp(difference)
    return {
        "mean": float(np.abs(difference).mean()),
        "p95": float(np.quantile(np.abs(difference), 0.95)),
        "outside": float(((ratio < RATIO[0]) | (ratio > RATIO[1])).mean()),
        "tokens": int(starts[-1]),
    }
