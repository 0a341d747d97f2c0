"""Direct preference optimisation on stored token ids and stored reference log-probabilities."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.records import SCORES, Score
from contracts.stage import Context, Outcome
from training import losses
from training.config import DpoConfig
from training.data import Row, length_limit, pair_sequences, read_pairs, usable
from training.fit import Task, fit
from training.logprobs import TokenLogprobs, collate, sum_by_sequence
from training.loop import Loss, Totals
from training.models import load_causal, read_config, vocabulary_size

Reference = dict[tuple[str, int], Score]


def run(config: DpoConfig, context: Context) -> Outcome:
    """The stage `dpo`."""
    info = ModelInfo.read(config.model)
    info.require_causal()
    limit = length_limit(config, info)
    model_config = read_config(config.model)
    ledger = Ledger("pairs")
    rows = usable(
        (row for paths in zip(config.pairs, config.reference, strict=True) for row in referenced_pairs(*paths)),
        ledger,
        limit=limit,
        vocabulary=vocabulary_size(model_config),
        max_dropped=config.max_dropped,
        what="pairs",
    )
    task = Task(
        rows=rows,
        ledger=ledger,
        loss=dpo_loss(config),
        load=lambda dtype: load_causal(config.model, dtype),
        wrap=TokenLogprobs,
        auto=AutoModelForCausalLM,
        model_config=model_config,
    )
    return fit(config, context, task)


def dpo_loss(config: DpoConfig) -> Loss:
    """The loss of some pairs, plus `nll_coefficient` times the chosen answers' mean token NLL over the global batch."""

    def loss(model: Any, rows: list[Row], weights: Tensor, totals: Totals) -> dict[str, Tensor]:
        device = weights.device
        batch = collate((sequence for row in rows for sequence in row.sequences), device)
        logprobs = sum_by_sequence(model(batch.input_ids, batch.positions, batch.targets), batch.lengths)
        chosen, rejected = logprobs.view(-1, 2).unbind(1)
        lengths = torch.tensor(batch.lengths, device=device).view(-1, 2)
        reference = torch.tensor([row.constants for row in rows], device=device)
        result = losses.dpo(
            chosen,
            rejected,
            *reference.unbind(1),
            *lengths.unbind(1),
            beta=config.beta,
            kind=config.loss,
            label_smoothing=config.label_smoothing,
        )
        margin = result.chosen_reward - result.rejected_reward
        preference = (weights * result.loss).sum() / totals.rows
        nll = -(weights * chosen).sum() / totals.tokens
        means = {
            "accuracy": (margin > 0).float(),
            "chosen_reward": result.chosen_reward,
            "rejected_reward": result.rejected_reward,
            "margin": margin,
            "chosen_logp": chosen.detach(),
            "rejected_logp": rejected.detach(),
        }
        return {
            "loss": preference + config.nll_coefficient * nll,
            "nll": nll.detach(),
            **{name: (weights * value).sum() / totals.rows for name, value in means.items()},
        }

    return loss


def referenced_pairs(pairs: Path, reference: Path) -> Iterator[Row]:
    """Published pairs with the summed reference log-probabilities of both answers as constants.

    Raises:
        UserError: an answer has no reference value, two of them, or one of another length.
    """
    known = _read_reference(reference)
    for pair in read_pairs(pairs):
        sequences = pair_sequences(pair)
        sums = []
        for sample, sequence in zip((pair.chosen_sample, pair.rejected_sample), sequences, strict=True):
            score = known.get((pair.prompt_id, sample))
            where = f"prompt {pair.prompt_id}, sample {sample}"
            if score is None:
                raise UserError(
                    f"{reference} has no log-probabilities of {where}, which {pairs} needs. Score the rollouts that "
                    "these pairs were made from with kind=logprobs."
                )
            found = len(score.token_logprobs or ())
            if found != sequence.response_length:
                raise UserError(
                    f"{reference} has {found} token log-probabilities of {where}, but its response in {pairs} has "
                    f"{sequence.response_length} tokens: it is of other rollouts. Give the reference of these pairs."
                )
            sums.append(math.fsum(score.token_logprobs or ()))
        yield Row(pair.pair_id, sequences, tuple(sums))


def _read_reference(path: Path) -> Reference:
    known: Reference = {}
    for score in Artifact.open(path, SCORES).rows(Score):
        if score.token_logprobs is None:
            raise UserError(
                f"{path} holds no token log-probabilities: it was made by another kind of scorer. Give scores of "
                "kind=logprobs as the reference."
            )
        if (score.prompt_id, score.sample) in known:
            raise UserError(f"{path} holds prompt {score.prompt_id}, sample {score.sample} twice. Make it again.")
        known[score.prompt_id, score.sample] = score
    return known
