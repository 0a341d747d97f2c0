"""A micro-batch as an algorithm sees it: `Pairs` or `Samples`, from the model's outputs and the rows."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.algorithm import Answers, Pairs, Samples
from training.engines.base import Outputs
from training.loop import Part

DIVERGENCES = ("kl_to_reference", "kl_from_reference")
"""Outputs that a reference model beside the policy gives."""


def pairs(outputs: Outputs, part: Part, needs: tuple[str, ...]) -> Pairs:
    """Of rows with a chosen and a rejected answer."""
    logp = part.sum_by_response(outputs["logprobs"])
    collision = part.sum_by_response(outputs["log_collision"]) if "collision" in needs else None
    reference = part.numbers("reference").to(logp.dtype) if "reference" in needs else None
    if "reference" not in needs and "reference_model" in needs:
        reference = part.sum_by_response(outputs["reference"])
    columns = {
        "logp": logp,
        "length": part.batch.lengths.to(logp.dtype),
        "score": part.numbers("score").to(logp.dtype),
        "reference_logp": reference,
        "log_collision": collision,
        "truncated": part.numbers("truncated").bool(),
    }
    tokens = {name: outputs[name] for name in ("entropy", *DIVERGENCES) if name in outputs}
    if "tokens" in needs:
        tokens["logprobs"] = outputs["logprobs"]
        if "reference" in needs:
            tokens["reference"] = part.tokens("reference")
        elif "reference" in outputs:
            tokens["reference"] = outputs["reference"]
    seeds = part.response_seeds()
    sides = []
    for side in (0, 1):
        fields: dict[str, Any] = {name: None if value is None else value[side::2] for name, value in columns.items()}
        if tokens:
            own = _tokens_of_side(part, side)
            fields |= {name: value[own] for name, value in tokens.items()}
        sides.append(Answers(**fields, seeds=seeds[side::2]))
    chosen, rejected = sides
    return Pairs(
        chosen=chosen,
        rejected=rejected,
        weights=part.weights(len(part.rows)),
        total=part.totals.rows,
        chosen_tokens=part.totals.first_tokens,
        statistics=part.statistics,
        step=part.step,
        steps=part.steps,
        places=torch.tensor(part.places, device=logp.device),
        tags=[row.tags for row in part.rows],
    )


def _tokens_of_side(part: Part, side: int) -> Tensor:
    """Where the tokens of all chosen (0) or all rejected (1) answers are among those of the micro-batch."""
    lengths = [len(response.ids) for row in part.rows for response in row.responses]
    owners = np.repeat(np.arange(len(lengths)), lengths)
    return torch.from_numpy(np.flatnonzero(owners % 2 == side)).to(part.batch.lengths.device)


def samples(outputs: Outputs, part: Part, needs: tuple[str, ...]) -> Samples:
    """Of rows with the responses to one prompt each."""
    tokens = {name: part.tokens(name) for name in part.rows[0].responses[0].tokens}
    lengths = part.batch.lengths
    reference = tokens["reference"] if "reference" in needs else outputs.get("reference")
    counts = [len(row.responses) for row in part.rows]
    places = [start + place for start, count in zip(part.starts, counts, strict=True) for place in range(count)]
    return Samples(
        logprobs=outputs["logprobs"],
        entropy=outputs["entropy"],
        proximal=tokens["proximal"],
        behaviour=tokens["behaviour"],
        advantages=tokens["advantages"],
        lengths=lengths,
        weights=part.weights(len(lengths)),
        total=part.totals.responses,
        total_tokens=part.totals.tokens,
        reference=reference,
        values=outputs.get("values"),
        old_values=tokens.get("values"),
        returns=tokens.get("returns"),
        statistics=part.statistics,
        rewards=part.numbers("reward"),
        prompts=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(lengths.device),
        total_prompts=part.totals.rows,
        truncated=part.numbers("truncated").bool(),
        **{name: outputs[name] for name in DIVERGENCES if name in outputs},
        step=part.step,
        steps=part.steps,
        places=torch.tensor(places, device=lengths.device),
        tags=[row.tags for row, count in zip(part.rows, counts, strict=True) for _ in range(count)],
        seeds=part.response_seeds(),
    )
