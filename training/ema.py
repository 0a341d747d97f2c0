"""Computes an exponential moving average of policies, for use as a slowly changing reference."""

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from contracts.errors import UserError
from contracts.fingerprint import weights_fingerprint
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.stage import Context, Outcome
from modeling.loading import load_causal, read_config, tensor_shapes
from training.checkpoint import save_checkpoint
from training.config import EmaConfig


@torch.no_grad()
def run(config: EmaConfig, context: Context) -> Outcome:
    """Publish decay · average + (1 - decay) · model, computed in float32 and stored in the dtype of `model`.

    Raises:
        UserError: the two models have different architectures.
    """
    logging.disable_progress_bar()
    for path in (config.average, config.model):
        ModelInfo.read(path).require_causal()
    model_config = read_config(config.model)
    shapes = tensor_shapes(AutoModelForCausalLM, model_config)
    with context.timed("load"):
        average, model = (load_causal(path, torch.float32, master=True) for path in (config.average, config.model))
    target, state = average.state_dict(), model.state_dict()
    if {name: tensor.shape for name, tensor in target.items()} != {name: t.shape for name, t in state.items()}:
        raise UserError(f"{config.average} and {config.model} are of different architectures and have no average.")
    with context.timed("compute"):
        mean = {name: target[name].lerp(state[name], 1 - config.decay) for name in target}
    with context.timed("save"):
        dtype = getattr(model_config, "dtype", None) or torch.float32
        save_checkpoint(
            context.publication, mean, model, start=config.model, shapes=shapes, dtype=dtype, changes={}, unit="models"
        )
        ledger = Ledger("models")
        ledger.keep(2)
        context.publication.write_rows("average.jsonl", [{"decay": config.decay}], ledger)
    return Outcome("models", {"decay": config.decay}, weights_fingerprint(context.publication.directory))
