"""From rows to a published checkpoint: what all training stages do the same way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from contracts.fingerprint import weights_fingerprint
from contracts.ledger import Ledger
from contracts.stage import Context, Outcome
from training.checkpoint import save_checkpoint
from training.config import TrainingConfig
from training.data import Row
from training.distributed import gather, pick_dtype, start, zero_stage
from training.logprobs import TokenLogprobs, require_same_logits
from training.loop import Loss, train
from training.models import set_modes, set_trainable, tensor_shapes
from training.state import Line, TrainingState

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""What each optimizer keeps for every weight, under torch's names."""


@dataclass(frozen=True)
class Task:
    """What distinguishes one algorithm from another."""

    rows: list[Row]
    ledger: Ledger
    loss: Loss
    load: Callable[[torch.dtype], Any]
    """Loads the transformers model."""
    wrap: Callable[[Any], nn.Module]
    """Makes it the module that `loss` calls; its attribute `model` is what was loaded."""
    auto: Any
    """The transformers auto class of the published model."""
    model_config: Any
    """transformers configuration of the published model."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Entries of the start model's config.json that change."""
    held_out: list[Row] = field(default_factory=list)
    """Rows to measure the final model by."""
    facts: dict[str, Any] = field(default_factory=dict)


def fit(config: TrainingConfig, context: Context, task: Task) -> Outcome:
    """Load, train, validate, publish."""
    logging.disable_progress_bar()
    dtype = pick_dtype(config)
    with context.timed("load"):
        shapes = tensor_shapes(task.auto, task.model_config)
        accelerator = start(config, dtype)
        # Without DeepSpeed, which keeps fp32 master weights itself, the weights are fp32 and bf16 is autocast:
        # at the learning rates of preference learning an update is smaller than a bf16 weight's last bit.
        model = task.load(dtype if zero_stage(accelerator) else torch.float32)
        set_trainable(model, config.frozen)
        set_modes(model, config.gradient_checkpointing)
        module = task.wrap(model)
        optimizer: Any = _optimizer(config, module)
        prepared, optimizer = accelerator.prepare(module, optimizer)
        set_modes(model, config.gradient_checkpointing)
        if isinstance(module, TokenLogprobs):
            with accelerator.autocast():
                require_same_logits(prepared, module, task.rows[0].sequences[0], accelerator.device)
    state = TrainingState(
        context.publication.directory / "state" / "training.safetensors",
        accelerator,
        module,
        optimizer,
        moments=MOMENTS[config.optimizer],
        seconds=config.checkpoint_seconds,
    )
    with context.timed("compute"):
        log = train(config, context, accelerator, prepared, optimizer, task.rows, task.held_out, task.loss, state)
    with context.timed("save"):
        gathered = gather(accelerator, prepared, module)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return Outcome(task.ledger.unit)
        weights = {
            name.removeprefix("model."): tensor for name, tensor in gathered.items() if name.startswith("model.")
        }
        save_checkpoint(
            context.publication,
            weights,
            model,
            start=config.model,
            shapes=shapes,
            dtype=dtype,
            changes=task.changes,
            unit=task.ledger.unit,
        )
        context.publication.write_rows("training-log.jsonl", log, task.ledger)
    facts = {
        **task.facts,
        "steps": len(log),
        "resumed_steps": state.resumed_steps,
        "final": _final(log),
        "tokens": sum(len(sequence.ids) for row in task.rows for sequence in row.sequences),
        "dtype": str(dtype).removeprefix("torch."),
        "master_dtype": "float32",
        "attention": model.config._attn_implementation,
        "distributed": accelerator.distributed_type.value,
        "zero_stage": zero_stage(accelerator),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }
    return Outcome(task.ledger.unit, facts, weights_fingerprint(context.publication.directory))


def _final(log: list[Line]) -> Line:
    return {name: value for name, value in log[-1].items() if name != "step"}


def _optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=False
    )
