"""Creates an untrained critic, a policy with a value head of zeros, for runs without a reward model to start from."""

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from contracts.fingerprint import weights_fingerprint
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.stage import Context, Outcome
from modeling.loading import load_reward, read_config, tensor_shapes
from training.checkpoint import save_checkpoint
from training.config import ValueHeadConfig
from training.models import classifier_changes


@torch.no_grad()
def run(config: ValueHeadConfig, context: Context) -> Outcome:
    """Publish the model as a sequence classifier with one label, whose score is 0 for every input; keeps the dtype.

    A random head would add noise as large as the rewards to the first advantages.

    Raises:
        UserError: the model is not a causal language model, or its classifier has no linear head.
    """
    logging.disable_progress_bar()
    ModelInfo.read(config.model).require_causal()
    model_config = read_config(config.model)
    model_config.num_labels = 1
    shapes = tensor_shapes(AutoModelForSequenceClassification, model_config)
    dtype = getattr(model_config, "dtype", None) or torch.float32
    with context.timed("load"):
        critic = load_reward(config.model, torch.float32, seed=0, master=True)
        critic.score.weight.zero_()
    with context.timed("save"):
        changes = classifier_changes(config.model, model_config)
        state = critic.state_dict()
        save_checkpoint(
            context.publication, state, critic, start=config.model, shapes=shapes, dtype=dtype, changes=changes,
            unit="models",
        )  # fmt: skip
        ledger = Ledger("models")
        ledger.keep()
        context.publication.write_rows("value-head.jsonl", [{"value": 0.0}], ledger)
    return Outcome("models", {}, weights_fingerprint(context.publication.directory))
