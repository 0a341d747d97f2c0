"""Trains the critic of PPO, a sequence classifier that is read at every token, on the returns of an experience."""

from collections.abc import Iterator

from transformers import AutoModelForSequenceClassification

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.records import EXPERIENCE, ExperienceRow
from contracts.stage import Context, Outcome
from modeling.loading import load_reward, read_config, vocabulary_size
from modeling.modules import TokenValues
from modeling.rows import Response, Row, float_values, token_ids
from training.algorithm import Metrics
from training.algorithms.parts import clipped_value_loss
from training.config import CriticConfig
from training.data import length_limit, usable_rows
from training.engines.base import Outputs
from training.fit import TrainingTask, fit
from training.loop import Learning, Loss, MicroBatch
from training.models import classifier_changes


def run(config: CriticConfig, context: Context) -> Outcome:
    """Run the stage `critic`."""
    info = ModelInfo.read(config.model)
    info.require_classifier_start()
    model_config = read_config(config.model)
    model_config.num_labels = 1
    ledger = Ledger("prompts")
    rows = usable_rows(
        value_rows(config),
        ledger,
        limit=length_limit(config, info),
        vocabulary=vocabulary_size(model_config),
        max_dropped=config.max_dropped,
        what=str(config.experience),
    )
    task = TrainingTask(
        ledger=ledger,
        learning=Learning(rows, critic_loss(config)),
        load=lambda dtype, empty: load_reward(config.model, dtype, config.seed, master=True, empty=empty),
        wrap=TokenValues,
        auto=AutoModelForSequenceClassification,
        model_config=model_config,
        changes=classifier_changes(config.model, model_config),
    )
    return fit(config, context, task)


def critic_loss(config: CriticConfig) -> Loss:
    """The clipped value loss, averaged over the response tokens of the global batch."""

    def loss(outputs: Outputs, micro_batch: MicroBatch) -> Metrics:
        values, old, returns = outputs["values"], micro_batch.tokens("values"), micro_batch.tokens("returns")
        error = (values.detach() - returns).square()
        total = micro_batch.totals.tokens
        return {
            "loss": micro_batch.weight * clipped_value_loss(values, old, returns, config.clip).sum() / total,
            "value": micro_batch.weight * values.detach().sum() / total,
            "return": micro_batch.weight * returns.sum() / total,
            "squared_error": micro_batch.weight * error.sum() / total,
            "clipped": micro_batch.weight * ((values.detach() - old).abs() > config.clip).float().sum() / total,
        }

    return loss


def value_rows(config: CriticConfig) -> Iterator[Row]:
    """Yield prompts with their samples, the critic's old values and its targets.

    Raises:
        UserError: the experience has no values or returns.
    """
    for row in Artifact.open(config.experience, EXPERIENCE).rows(ExperienceRow):
        responses = []
        for sample in row.samples:
            if sample.values is None or sample.returns is None:
                raise UserError(
                    f"{config.experience} has no values or returns for a critic: its algorithm needs none. Use one "
                    "that does, for example ppo."
                )
            tokens = {"values": float_values(sample.values), "returns": float_values(sample.returns)}
            responses.append(Response(token_ids(sample.response_ids), {}, tokens))
        yield Row(row.prompt_id, token_ids(row.prompt_ids), tuple(responses))
