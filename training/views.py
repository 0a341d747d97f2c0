"""Builds the batch types of algorithms, `Pairs` and `Samples`, from the model's outputs and a micro-batch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.algorithm import Answers, Pairs, Samples
from training.engines.base import Outputs
from training.loop import MicroBatch

DIVERGENCES = ("kl_to_reference", "kl_from_reference")
"""Outputs that need a reference model loaded with the policy."""


def pairs(outputs: Outputs, micro_batch: MicroBatch, needs: tuple[str, ...]) -> Pairs:
    """Build `Pairs` from rows with a chosen and a rejected answer."""
    logp = micro_batch.sum_by_response(outputs["logprobs"])
    collision = micro_batch.sum_by_response(outputs["log_collision"]) if "collision" in needs else None
    reference = micro_batch.numbers("reference").to(logp.dtype) if "reference" in needs else None
    if "reference" not in needs and "reference_model" in needs:
        reference = micro_batch.sum_by_response(outputs["reference"])
    columns = {
        "logp": logp,
        "length": micro_batch.batch.lengths.to(logp.dtype),
        "score": micro_batch.numbers("score").to(logp.dtype),
        "reference_logp": reference,
        "log_collision": collision,
        "truncated": micro_batch.numbers("truncated").bool(),
    }
    tokens = {name: outputs[name] for name in ("entropy", *DIVERGENCES) if name in outputs}
    if "tokens" in needs:
        tokens["logprobs"] = outputs["logprobs"]
        if "reference" in needs:
            tokens["reference"] = micro_batch.tokens("reference")
        elif "reference" in outputs:
            tokens["reference"] = outputs["reference"]
    seeds = micro_batch.response_seeds()
    sides = []
    for side in (0, 1):
        fields: dict[str, Any] = {name: None if value is None else value[side::2] for name, value in columns.items()}
        if tokens:
            own = _tokens_of_side(micro_batch, side)
            fields |= {name: value[own] for name, value in tokens.items()}
        sides.append(Answers(**fields, seeds=seeds[side::2]))
    chosen, rejected = sides
    return Pairs(
        chosen=chosen,
        rejected=rejected,
        weights=micro_batch.weights(len(micro_batch.rows)),
        total=micro_batch.totals.rows,
        chosen_tokens=micro_batch.totals.first_tokens,
        statistics=micro_batch.statistics,
        step=micro_batch.step,
        steps=micro_batch.steps,
        places=torch.tensor(micro_batch.places, device=logp.device),
        tags=[row.tags for row in micro_batch.rows],
    )


def _tokens_of_side(micro_batch: MicroBatch, side: int) -> Tensor:
    """Indices of the tokens of all chosen (0) or all rejected (1) answers among those of the micro-batch."""
    lengths = [len(response.ids) for row in micro_batch.rows for response in row.responses]
    owners = np.repeat(np.arange(len(lengths)), lengths)
    return torch.from_numpy(np.flatnonzero(owners % 2 == side)).to(micro_batch.batch.lengths.device)


def samples(outputs: Outputs, micro_batch: MicroBatch, needs: tuple[str, ...]) -> Samples:
    """Build `Samples` from rows with all responses to one prompt each."""
    tokens = {name: micro_batch.tokens(name) for name in micro_batch.rows[0].responses[0].tokens}
    lengths = micro_batch.batch.lengths
    reference = tokens["reference"] if "reference" in needs else outputs.get("reference")
    counts = [len(row.responses) for row in micro_batch.rows]
    places = [start + place for start, count in zip(micro_batch.starts, counts, strict=True) for place in range(count)]
    return Samples(
        logprobs=outputs["logprobs"],
        entropy=outputs["entropy"],
        proximal=tokens["proximal"],
        behaviour=tokens["behaviour"],
        advantages=tokens["advantages"],
        lengths=lengths,
        weights=micro_batch.weights(len(lengths)),
        total=micro_batch.totals.responses,
        total_tokens=micro_batch.totals.tokens,
        reference=reference,
        values=outputs.get("values"),
        old_values=tokens.get("values"),
        returns=tokens.get("returns"),
        statistics=micro_batch.statistics,
        rewards=micro_batch.numbers("reward"),
        prompts=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(lengths.device),
        total_prompts=micro_batch.totals.rows,
        truncated=micro_batch.numbers("truncated").bool(),
        **{name: outputs[name] for name in DIVERGENCES if name in outputs},
        step=micro_batch.step,
        steps=micro_batch.steps,
        places=torch.tensor(places, device=lengths.device),
        tags=[row.tags for row, count in zip(micro_batch.rows, counts, strict=True) for _ in range(count)],
        seeds=micro_batch.response_seeds(),
    )
