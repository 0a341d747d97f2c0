"""Trains the policy by any algorithm, on preference pairs or on scored samples."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from contracts.architectures import support_of
from contracts.artifacts import Artifact, model_fingerprint
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.records import EXPERIENCE, SCORES, ExperienceRow, ExperienceSample, Score
from contracts.stage import Context, Outcome
from modeling.attention import is_packed, use_packed_attention
from modeling.loading import load_causal, load_value_head, read_config, vocabulary_size
from modeling.modules import TokenLogprobs
from modeling.packing import Packing
from modeling.rows import Response, Row, float_values, token_ids
from training import views
from training.algorithm import Metrics, Pairs, Statistics, Step
from training.config import PolicyConfig
from training.correction import correct
from training.data import length_limit, pair_row, read_pairs, usable_rows
from training.drift import measure_drift
from training.engines.base import Outputs, TrainingEngine
from training.fit import TrainingTask, fit
from training.loop import Learning, MicroBatch
from training.registry import Description, describe, load

Reference = dict[tuple[str, int], Score]
RESERVED = {"step", "learning_rate", "grad_norm", "due", "stop"}
"""Names in a line of the training log that an algorithm's metrics must not use."""


def run(config: PolicyConfig, context: Context) -> Outcome:
    """Run the stage `policy`."""
    info = ModelInfo.read(config.model)
    info.require_causal()
    description = describe(config.algorithm)
    from_pairs = description.reads == "pairs"
    model_config = read_config(config.model)
    ledger = Ledger("pairs" if from_pairs else "prompts")
    samplers: set[str] = set()
    rows = usable_rows(
        pair_rows(config, description) if from_pairs else sample_rows(config, samplers),
        ledger,
        limit=length_limit(config, info),
        vocabulary=vocabulary_size(model_config),
        max_dropped=config.max_dropped,
        what=ledger.unit,
    )
    needs = description.needs
    task = TrainingTask(
        ledger=ledger,
        learning=learning(config, description, rows),
        load=lambda dtype, empty: load_causal(config.model, dtype, master=True, empty=empty),
        wrap=lambda model: TokenLogprobs(
            model,
            entropy=not from_pairs or "entropy" in needs,
            collision="collision" in needs,
            value_head=load_value_head(config.model, model.config.hidden_size) if config.value_head else None,
            reference=load_reference(config, model),
        ),
        auto=AutoModelForCausalLM,
        model_config=model_config,
        facts={"algorithm": config.algorithm, "settings": config.settings},
        before=None if from_pairs else lambda engine, packing: _check_drift(config, rows, samplers, engine, packing),
    )
    return fit(config, context, task)


def load_reference(config: PolicyConfig, policy: Any) -> Any:
    """Load the reference model, with the policy's number format and attention; None if the algorithm needs none.

    Raises:
        UserError: its vocabulary differs from the policy's, or it cannot compute the policy's batches.
    """
    if config.reference_model is None:
        return None
    reference = load_causal(config.reference_model, policy.get_input_embeddings().weight.dtype)
    known, own = (vocabulary_size(model.config) for model in (reference, policy))
    if known != own:
        raise UserError(
            f"reference_model={config.reference_model} has {known} token ids and the policy {own}, so their "
            "distributions cannot be compared. Give a model of the policy's family."
        )
    if is_packed(policy):
        if support_of(reference.config.to_dict()) != "flat":
            raise UserError(
                f"reference_model={config.reference_model}: {type(reference).__name__} is not known to compute flat "
                "batches. Set packing=padded."
            )
        use_packed_attention(reference)
    return reference


def learning(config: PolicyConfig, description: Description, rows: list[Row]) -> Learning:
    """Wrap the algorithm's functions for the training loop: they get views of micro-batches, and are checked."""
    module, settings = load(config.algorithm), config.settings
    view = views.pairs if description.reads == "pairs" else views.samples

    def loss(outputs: Outputs, micro_batch: MicroBatch) -> Metrics:
        batch = view(outputs, micro_batch, description.needs)
        found = module.loss(batch, **description.arguments("loss", settings))
        metrics = _require_metrics(found, f"algorithm {config.algorithm!r}: loss", {"loss"})
        if isinstance(batch, Pairs):
            nll = batch.chosen_nll()
            metrics = {
                "nll": nll.detach(),
                "chosen_logp": batch.mean(batch.chosen.logp.detach()),
                "rejected_logp": batch.mean(batch.rejected.logp.detach()),
                **metrics,
                "loss": metrics["loss"] + config.nll_coefficient * nll,
            }
        return metrics

    def statistics(outputs: Outputs, micro_batch: MicroBatch) -> Metrics:
        found = module.statistics(
            view(outputs, micro_batch, description.needs), **description.arguments("statistics", settings)
        )
        return _require_metrics(
            found, f"algorithm {config.algorithm!r}: statistics", set(), _vector_length(micro_batch, description)
        )

    def update(step: Step) -> Statistics:
        found = module.update(step, **description.arguments("update", settings))
        return _require_updates(found, f"algorithm {config.algorithm!r}: update", description.state)

    functions = description.functions
    return Learning(
        rows,
        loss,
        statistics if "statistics" in functions else None,
        update if "update" in functions else None,
        description.state,
    )


def _vector_length(micro_batch: MicroBatch, description: Description) -> int:
    """Length of a vector with one number per pair or response of the step."""
    return micro_batch.totals.rows if description.reads == "pairs" else micro_batch.totals.responses


def _require_updates(found: Any, what: str, state: Mapping[str, float]) -> Statistics:
    """Raise UserError unless `update` returned finite numbers or vectors, including all names in STATE."""
    if not isinstance(found, dict):
        raise UserError(f"{what} must return a dict of numbers and vectors; found {type(found).__name__}.")
    updates: Statistics = {}
    for name, value in found.items():
        if isinstance(value, Tensor) and value.ndim:
            updates[name] = value
            continue
        try:
            updates[name] = float(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{what} returned {name!r} as {type(value).__name__}; return numbers or tensors."
            ) from error
        if not math.isfinite(updates[name]):
            raise UserError(f"{what} returned {name!r} as {updates[name]}; it must be finite.")
    if missing := [name for name in state if not isinstance(updates.get(name), float)]:
        raise UserError(f"{what} did not return the number {missing[0]!r}, which is in STATE.")
    if taken := RESERVED & updates.keys():
        raise UserError(
            f"{what} returned a number named {min(taken)!r}, a name that the training log uses itself. Rename it."
        )
    return updates


def _require_metrics(found: Any, what: str, names: set[str], whole: int | None = None) -> Metrics:
    """Raise UserError unless an algorithm returned scalars by name, including `names`, and a loss with a gradient.

    Vectors of length `whole` are accepted as well, if it is given.
    """
    if not isinstance(found, dict) or not names <= found.keys():
        shown = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{what} must return a dict of metrics{', `loss` among them' if names else ''}; found {shown}.")
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.shape not in {(), (whole,)}:
            shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{what} returned {name!r} as {shape}, not as a tensor of shape () like batch.mean's.")
    if taken := RESERVED & found.keys():
        raise UserError(
            f"{what} returned a metric named {min(taken)!r}, a name that the training log uses itself. Rename it."
        )
    if names and torch.is_grad_enabled() and not found["loss"].requires_grad:
        raise UserError(f"{what} returned a loss without gradient, from which nothing is learned. Do not detach it.")
    return found


def _check_drift(
    config: PolicyConfig, rows: list[Row], samplers: set[str], engine: TrainingEngine, packing: Packing
) -> dict[str, Any]:
    """Compute `proximal` for all rows, check its drift from the generation engine's log-probabilities, and correct it.

    Returns facts for the manifest.

    Raises:
        UserError: the samples are from this very policy, but the drift exceeds `max_drift`.
    """
    fresh = samplers == {model_fingerprint(config.model)}
    drift = measure_drift(rows, engine, packing, config.micro_batch_tokens)
    if fresh and drift["mean"] > config.max_drift:
        raise UserError(
            f"the log-probabilities of the engine that sampled differ from the trainer's by {drift['mean']:.3g} nats a "
            f"token (ratios outside [0.9, 1.1]: {drift['outside']:.1%}), more than max_drift={config.max_drift:g}. The "
            "two do not compute the same model: check dtypes, the chat template and the engine's version, or raise it."
        )
    found: dict[str, Any] = {"drift": {**drift, "fresh": fresh}}
    if config.correction is not None:
        found["metrics"] = correct([response for row in rows for response in row.responses], config.correction)
    return found


def sample_rows(config: PolicyConfig, samplers: set[str]) -> Iterator[Row]:
    """Yield prompts with their samples from published experience; adds the policies that sampled them to `samplers`.

    Raises:
        UserError: the experience was computed by another algorithm.
    """
    assert config.experience is not None
    artifact = Artifact.open(config.experience, EXPERIENCE)
    maker = artifact.manifest.key_parts.get("config", {}).get("algorithm", config.algorithm)
    if maker != config.algorithm:
        raise UserError(
            f"{config.experience} holds the advantages of algorithm={maker}, which are not those of "
            f"algorithm={config.algorithm}. Make an experience with algorithm={config.algorithm}."
        )
    for prompt in artifact.rows(ExperienceRow):
        samplers.add(prompt.policy)
        tags = prompt.tags or ()
        yield Row(prompt.prompt_id, token_ids(prompt.prompt_ids), tuple(map(_response, prompt.samples)), tags)


def _response(sample: ExperienceSample) -> Response:
    columns = {name: getattr(sample, name) for name in ("behaviour", "advantages", "reference", "values", "returns")}
    tokens = {name: float_values(column) for name, column in columns.items() if column is not None}
    numbers = {"reward": sample.reward, "truncated": float(sample.finish_reason == "length")}
    return Response(token_ids(sample.response_ids), numbers, tokens)


def pair_rows(config: PolicyConfig, description: Description) -> Iterator[Row]:
    """Yield published pairs, with reference log-probabilities (sums, or also per token) if the algorithm needs them."""
    if "reference" not in description.needs:
        yield from (pair_row(pair) for path in config.pairs for pair in read_pairs(path))
        return
    for paths in zip(config.pairs, config.reference, strict=True):
        yield from referenced_pairs(*paths, tokens="tokens" in description.needs)


def referenced_pairs(pairs: Path, reference: Path, *, tokens: bool) -> Iterator[Row]:
    """Yield published pairs with the summed reference log-probabilities of both answers, if `tokens` also per token.

    Raises:
        UserError: an answer has no reference log-probabilities, has them twice, or their number is not its length.
    """
    known = _read_reference(reference)
    for pair in read_pairs(pairs):
        sums, columns = [], []
        for sample, ids in ((pair.chosen_sample, pair.chosen_ids), (pair.rejected_sample, pair.rejected_ids)):
            score = known.get((pair.prompt_id, sample))
            where = f"prompt {pair.prompt_id}, sample {sample}"
            if score is None:
                raise UserError(
                    f"{reference} has no log-probabilities of {where}, which {pairs} needs. Score the rollouts that "
                    "these pairs were made from with kind=logprobs."
                )
            found = len(score.token_logprobs or ())
            if found != len(ids):
                raise UserError(
                    f"{reference} has {found} token log-probabilities of {where}, but its response in {pairs} has "
                    f"{len(ids)} tokens: it is of other rollouts. Give the reference of these pairs."
                )
            sums.append({"reference": math.fsum(score.token_logprobs or ())})
            columns.append({"reference": float_values(score.token_logprobs or ())} if tokens else {})
        yield pair_row(pair, *zip(sums, columns, strict=True))


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
