"""Loads, trains, validates and publishes a model, the same way in all training stages."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from contracts import stopping
from contracts.checkpoint_probe import FACT as PROBE
from contracts.fingerprint import weights_fingerprint
from contracts.ledger import Ledger
from contracts.stage import Context, Outcome
from modeling.attention import attention_on, use_packed_attention
from modeling.loading import check_weights, load_causal, load_classifier, load_value_head, tensor_shapes
from modeling.master import MasterWeights, split
from modeling.modes import set_modes
from modeling.modules import TokenLogprobs, Trained
from modeling.packing import Packing
from training.checkpoint import save_checkpoint
from training.config import TrainingConfig
from training.engines import create_engine
from training.engines.base import TrainingEngine
from training.loop import FinalReport, HeldOut, Learning, measure, train
from training.lora import add_adapters, merge_adapters
from training.models import pick_dtype, set_trainable
from training.packing import packing_of
from training.readback import checkpoint_probe, compute_outputs, probe_rows, verify_checkpoint
from training.slices import WeightSlices, reads_slices
from training.state import Line, TrainingState

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""The moments of each optimizer, by torch's state names."""


@dataclass(frozen=True)
class TrainingTask:
    """The parts of a training that differ between stages: data, loss, model class and head."""

    ledger: Ledger
    learning: Learning
    load: Callable[[torch.dtype, bool], Any]
    """`load(dtype, empty)` returns the transformers model, without its weights if `empty`."""
    wrap: Callable[[Any], Trained]
    """Wraps the model with the head that the loss needs."""
    auto: Any
    """The transformers auto class of the published model."""
    model_config: Any
    """transformers configuration of the published model."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Entries of the initial model's config.json that change."""
    facts: dict[str, Any] = field(default_factory=dict)
    held_out: HeldOut | None = None
    before: Callable[[TrainingEngine, Packing], dict[str, Any]] | None = None
    """Called before training with the engine that holds the initial model; returns facts for the manifest."""

    def read_back(self, directory: Path) -> Trained:
        """Load the published checkpoint as the trained module, on the CPU in fp32."""
        load = load_causal if self.auto is AutoModelForCausalLM else load_classifier
        module = self.wrap(load(directory, torch.float32))
        if isinstance(module, TokenLogprobs) and module.value_head is not None:
            module.value_head.weight.data.copy_(load_value_head(directory, module.value_head.in_features))
        return module


def fit(config: TrainingConfig, context: Context, task: TrainingTask) -> Outcome:
    """Load the model, train it, validate the result and publish the checkpoint."""
    logging.disable_progress_bar()
    dtype = pick_dtype(config)
    rows = task.learning.rows
    with context.timed("load"):
        shapes = tensor_shapes(task.auto, task.model_config)
        if config.parallel.zero == 3:  # under ZeRO-3 transformers' loader does not report missing or unexpected keys
            check_weights(config.model, "causal" if task.auto is AutoModelForCausalLM else "classifier")
        engine = create_engine(config, dtype)
        # Without fp32 master weights in the engine, the weights are fp32 and bf16 is autocast: at the learning rates of
        # preference learning an update is smaller than the last bit of a bf16 weight. With LoRA only the adapters,
        # which are fp32, are updated.
        initial = MasterWeights(config.model)
        by_slices = reads_slices(config)
        model = task.load(dtype if engine.master_copies or config.lora else torch.float32, by_slices)
        own_attention = model.config._attn_implementation
        packing = set_packing(config, model)
        transposed: frozenset[str] = frozenset()
        if config.lora is not None:
            transposed = add_adapters(model, config.lora, config.seed)
        else:
            set_trainable(model, config.frozen)
        set_modes(model, config.gradient_checkpointing)
        module = task.wrap(model)
        engine.prepare(
            module,
            lambda parameters: make_optimizer(config, parameters, fused=not engine.master_copies),
            slices=WeightSlices(config.model) if by_slices else None,
        )
        set_modes(model, config.gradient_checkpointing)
        precision = _restore_master_weights(initial, engine, dtype)
    state = TrainingState(
        context.publication.directory / "state" / "training.safetensors",
        engine,
        moments=MOMENTS[config.optimizer],
        seconds=config.checkpoint_seconds,
    )
    report = FinalReport({}, {})
    with context.timed("compute"):
        before_facts = task.before(engine, packing) if task.before else {}
        with stopping.deferred():  # a stop between `train` and `measure` must not lose steps
            log = train(config, context, engine, task.learning, packing, state)
            if task.held_out is not None:
                report = measure(config, engine, task.held_out, packing, state, log)
    with context.timed("save"):
        probed = probe_rows(rows)
        outputs = compute_outputs(engine, probed, packing)
        gathered = _gather(engine, dtype)
        engine.barrier()
        if not engine.is_main:
            return Outcome(task.ledger.unit)
        weights = {
            name.removeprefix("model."): tensor for name, tensor in gathered.items() if name.startswith("model.")
        }
        if initial.has_remainders:
            weights = {name: _restore_remainder(initial, name, tensor) for name, tensor in weights.items()}
        if config.lora is not None:
            weights = merge_adapters(weights, config.lora, transposed)
        checkpoint_facts = save_checkpoint(
            context.publication,
            weights,
            model,
            start=config.model,
            shapes=shapes,
            dtype=dtype,
            changes=task.changes,
            unit=task.ledger.unit,
            value_head=gathered.get("value_head.weight"),
        )
        del gathered, weights  # before the checkpoint is read back
        directory = context.publication.directory
        read_back = verify_checkpoint(directory, outputs, probed, packing, dtype, task.read_back)
        context.publication.write_rows("training-log.jsonl", log, task.ledger)
        for name, lines in report.files.items():
            context.publication.write_rows(name, lines, Ledger(task.ledger.unit))
    facts = {
        **task.facts,
        **before_facts,
        **checkpoint_facts,
        "read_back": read_back,
        PROBE: None if (found := checkpoint_probe(probed, outputs, dtype)) is None else msgspec.to_builtins(found),
        "start_precision": precision,
        "steps": len(log),
        "resumed_steps": state.resumed_steps,
        "final": _final(log),
        "tokens": sum(row.tokens for row in rows),
        "dtype": str(dtype).removeprefix("torch."),
        "master_dtype": "float32",
        "trained_parameters": sum(math.prod(shape) for shape in engine.trained_shapes().values()),
        "attention": str(own_attention) if packing == "padded" else attention_on(engine.device, dtype),
        "packing": packing,
        **engine.facts(),
        "device": engine.device.type,
    }
    return Outcome(task.ledger.unit, facts, weights_fingerprint(context.publication.directory))


def _restore_master_weights(initial: MasterWeights, engine: TrainingEngine, dtype: torch.dtype) -> str:
    """Restore the previous training's fp32 weights in an engine that has initialized its master weights from bfloat16.

    Returns the precision of the weights that this training starts from.
    """
    if not initial.has_remainders or not engine.master_copies or dtype == torch.float32:
        return initial.precision
    names = {name: name.removeprefix("model.") for name in engine.trained_shapes()}
    known = {name: stored for name, stored in names.items() if stored in initial.tensors}
    if any(name.startswith("model.") and name not in known for name in names):
        return "bfloat16"  # this architecture's tensors have other names in memory than in files
    for name, stored in known.items():
        engine.set_weights(name, initial.read(stored))
    return "float32"


def _restore_remainder(initial: MasterWeights, name: str, tensor: Tensor) -> Tensor:
    """The initial fp32 value of a frozen bfloat16 weight, with its remainder to fp32; any other tensor unchanged."""
    stored = name.replace(".base_layer.", ".")
    if tensor.dtype != torch.bfloat16 or stored not in initial.tensors or initial.tensors[stored].shape != tensor.shape:
        return tensor
    exact = initial.read(stored)
    return exact if torch.equal(split(exact)[0], tensor.cpu()) else tensor


def _gather(engine: TrainingEngine, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights, in the main process; the engine's fp32 master weights if it has them."""
    gathered = engine.gather_weights()
    if engine.master_copies and dtype != torch.float32:
        for name in engine.trained_shapes():
            (weights,) = engine.read(name, ("weights",))
            if engine.is_main:
                gathered[name] = weights.detach().to("cpu", torch.float32)
    return gathered


def set_packing(config: TrainingConfig, model: Any) -> Packing:
    """Switch `model` to packed attention if it supports it; returns the packing.

    Raises:
        UserError: the config asks for a packing that this model does not support.
    """
    packing = packing_of(config, model.config.to_dict())
    if packing != "padded":
        use_packed_attention(model)
    return packing


def _final(log: list[Line]) -> Line:
    return {name: value for name, value in log[-1].items() if name != "step"}


def make_optimizer(
    config: TrainingConfig, parameters: list[nn.Parameter], *, fused: bool = True
) -> torch.optim.Optimizer:
    """Create the optimizer; fused kernels are only used without DTensors, which they do not support."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate)
    fused = fused and not any(isinstance(parameter, DTensor) for parameter in parameters)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=fused
    )
