"""Preflight checks of the training stages; see contracts/preflight.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import UNSET

from contracts.declaration import stages_of
from contracts.demonstrations import DemonstrationRow
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.preflight import Finding, Inspected
from training.config import EmaConfig, SftConfig, TrainingConfig, ValueHeadConfig
from training.packing import packing_of


def check_training(stage: Inspected) -> Iterator[Finding]:
    """Check the initial model, its trainable parameters, and the user's demonstrations if there are any."""
    config: TrainingConfig = stage.config
    if not (config.model / "config.json").is_file():
        return
    classifies = stages_of("training")[config.stage].has_score_head(config)
    yield _check_weights(config.model, classifies=classifies)
    settings = ModelInfo.read(config.model).settings
    yield Finding("ok", f"{config.model}: batches of {config.stage} are packed as {packing_of(config, settings)}")
    check_trained(config, classifies=classifies)
    _note_tokenizer(stage, config.model)
    if isinstance(config, SftConfig):
        yield from check_demonstrations(stage, config)


def check_new_critic(stage: Inspected) -> Iterator[Finding]:
    """Check the model that becomes a critic."""
    config: ValueHeadConfig = stage.config
    if (config.model / "config.json").is_file():
        yield _check_weights(config.model, classifies=True)
        _note_tokenizer(stage, config.model)


def check_average(stage: Inspected) -> Iterator[Finding]:
    """Check the two models that are averaged."""
    config: EmaConfig = stage.config
    for model in (config.average, config.model):
        if (model / "config.json").is_file():
            yield _check_weights(model, classifies=False)


def _check_weights(model: Path, *, classifies: bool) -> Finding:
    from modeling.loading import check_weights  # imported late: loads torch
    from modeling.master import MasterWeights

    check_weights(model, "classifier" if classifies else "causal")
    MasterWeights(model)  # checks that the remainders belong to the weights
    return Finding("ok", f"{model}: it holds the weights of its architecture, all of them finite")


def _note_tokenizer(stage: Inspected, model: Path) -> None:
    if ModelInfo.read(model).has_tokenizer:
        from contracts.chat import ChatTokenizer
        from modeling.inspect import record_probes

        record_probes(stage, ChatTokenizer(model))


def check_trained(config: TrainingConfig, *, classifies: bool) -> None:
    """Raise UserError if the config freezes or adapts parameters, or needs a head or token, that the model lacks."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from modeling.loading import empty_model, read_config
    from training.lora import add_adapters
    from training.models import classifier_changes, set_trainable

    model_config = read_config(config.model)
    model: Any = empty_model(AutoModelForSequenceClassification if classifies else AutoModelForCausalLM, model_config)
    if classifies and not hasattr(model, "score"):
        raise UserError(f"{type(model).__name__} has no linear layer `score` as its head; choose another model.")
    if classifies and ModelInfo.read(config.model).has_tokenizer:
        classifier_changes(config.model, model_config)
    if config.lora is None:
        set_trainable(model, config.frozen)
    else:
        add_adapters(model, config.lora, config.seed)


def check_demonstrations(stage: Inspected, config: SftConfig) -> Iterator[Finding]:
    """Render the demonstrations with the model's chat template, and report those that would be dropped."""
    from contracts.chat import ChatTokenizer
    from training.sft import tokenized

    ledger = Ledger("demonstrations")
    rows = (
        DemonstrationRow(one.messages, tools=UNSET if one.tools is None else one.tools)
        for one in stage.demonstrations()
    )
    chat = ChatTokenizer(config.model, config.chat_template_kwargs, config.date)
    count = sum(1 for _ in tokenized(rows, chat, ledger))
    if ledger.dropped:
        tried = count + sum(ledger.dropped.values())
        found = f"{config.model}: of {tried} of your demonstrations {tried - count} would be dropped: {ledger.dropped}"
        fix = "docs/stages.md (sft) says what the reasons mean, and what to do."
        yield Finding("warning" if count else "error", found, fix)
    elif count:
        yield Finding("ok", f"{config.model}: its chat template renders your demonstrations ({count} were tried)")
